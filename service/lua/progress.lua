-- Keeps how far a run is, as long as whoever says so has it.
if not holds(payload.run, payload.token) then return '{"lost":true}' end
for name, value in pairs(payload.fields) do redis.call('HSET', keys.run .. payload.run, name, value) end
return '{}'
