-- Moves the one pointer, if it still is where the caller saw it.
local active = tonumber(redis.call('HGET', keys.active, 'version'))
local epoch = tonumber(redis.call('HGET', keys.active, 'epoch') or '0')
if payload.expected_active ~= cjson.null and payload.expected_active ~= active then
  return cjson.encode({refused = 'active', active = active})
end
if payload.expected_epoch ~= cjson.null and payload.expected_epoch ~= epoch and active ~= payload.version then
  return cjson.encode({refused = 'epoch', active = active})
end
if redis.call('EXISTS', keys.version .. payload.version) == 0 then return '{"refused":"unknown"}' end
if active ~= payload.version then
  redis.call('HSET', keys.active, 'version', payload.version, 'previous', active or payload.version, 'epoch', epoch + 1)
  emit('version.activated', {version = payload.version, previous = active})
  local back = active and payload.version < active
  audit(back and 'version.rolled_back' or 'version.activated', {version = payload.version, previous = active})
end
return '{}'
