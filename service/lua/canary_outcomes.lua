-- Adds how requests ended, as long as the canary that they were counted for still is one.
if tonumber(redis.call('HGET', keys.canary, 'version')) ~= payload.version then return '{}' end
for name, number in pairs(payload.counts) do redis.call('HINCRBY', keys.canary, name, number) end
return '{}'
