-- Registers a version that is whole in the version store, and hands its run over to verification: at once, so that a
-- worker that sleeps on the way has either done all of it or nothing. Only the run under way may. Without a token it is a
-- repair, which registers what is found there, perhaps before its own run comes to this.
local repair = payload.token == cjson.null
local refused = not repair and past_training(payload.run, payload.token)
if refused then return refused end
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
if repair then return '{}' end

-- Those withdrawn meanwhile keep their status.
for _, id in ipairs(in_status('training')) do
  if field(id, 'run') == payload.run then move(id, 'trained', {version = payload.version}) end
end
hand_over(payload.run, payload.version)
return '{}'
