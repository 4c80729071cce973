-- Registers a version that is whole in the version store. Only the run under way may; without a token it is a repair,
-- which takes the version as it is found there, perhaps before its own run comes to this.
local repair = payload.token == cjson.null
if not repair and not holds(payload.run, payload.token) then return '{"refused":"fenced"}' end
local known = redis.call('GET', keys.version .. payload.version)
if known == payload.record then return '{}' end
if known and (repair or cjson.decode(known).run ~= payload.run) then return '{"refused":"exists"}' end
redis.call('DEL', keys.version_edits .. payload.version)
for _, id in ipairs(payload.members) do
  redis.call('SETBIT', keys.version_edits .. payload.version, field(id, 'seq'), 1)
end
redis.call('SET', keys.version .. payload.version, payload.record)
redis.call('ZADD', keys.versions, payload.version, payload.version)
emit('version.committed', {version = payload.version, edits = #payload.members})
return '{}'
