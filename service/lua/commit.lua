-- Registers a version that is whole in the version store. Only the current run may, and only with the newest token.
if payload.token ~= cjson.null and (redis.call('GET', keys.token) ~= tostring(payload.token)
  or redis.call('GET', keys.current) ~= payload.run) then
  return '{"refused":"fenced"}'
end
local known = redis.call('GET', keys.version .. payload.version)
if known == payload.record then return '{}' end
if known then return '{"refused":"exists"}' end
redis.call('DEL', keys.version_edits .. payload.version)
for _, id in ipairs(payload.members) do
  redis.call('SETBIT', keys.version_edits .. payload.version, field(id, 'seq'), 1)
end
redis.call('SET', keys.version .. payload.version, payload.record)
redis.call('ZADD', keys.versions, payload.version, payload.version)
emit('version.committed', {version = payload.version, edits = #payload.members})
return '{}'
