-- A verified version answers a part of the traffic while the pointer stays where its run saw it. Only for the run under
-- way; a repeated call changes nothing.
if redis.call('GET', keys.current) ~= payload.run then return '{"refused":"run"}' end
local active = tonumber(redis.call('HGET', keys.active, 'version'))
if redis.call('HGET', keys.active, 'epoch') ~= tostring(payload.expected_epoch) then
  return cjson.encode({refused = 'epoch', active = active})
end
if tonumber(redis.call('HGET', keys.active, 'canary')) == payload.version then return '{}' end
redis.call('HSET', keys.active, 'canary', payload.version)
redis.call('DEL', keys.canary)
redis.call('HSET', keys.canary, 'version', payload.version, 'since', context.now)
redis.call('HSET', keys.run .. payload.run, 'phase', 'canary')
emit('version.canary', {version = payload.version, active = active})
audit('version.canary', {version = payload.version, active = active})
return '{}'
