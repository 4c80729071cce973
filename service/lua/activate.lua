-- Moves the one pointer to a verified version, if it still is where the caller saw it and, for a run, if that is under
-- way. Whoever says which version is active ends the canary, also by naming the one that is.
local active = tonumber(redis.call('HGET', keys.active, 'version'))
local epoch = tonumber(redis.call('HGET', keys.active, 'epoch') or '0')
local canary = tonumber(redis.call('HGET', keys.active, 'canary'))
local moves = active ~= payload.version
if payload.run ~= cjson.null and payload.run ~= redis.call('GET', keys.current) and moves then
  return '{"refused":"run"}'
end
if payload.expected_active ~= cjson.null and payload.expected_active ~= active and moves then
  return cjson.encode({refused = 'active', active = active})
end
if payload.expected_epoch ~= cjson.null and payload.expected_epoch ~= epoch and moves then
  return cjson.encode({refused = 'epoch', active = active})
end
local known = redis.call('GET', keys.version .. payload.version)
if not known then return '{"refused":"unknown"}' end
-- It may have been rejected since the caller looked.
local state = cjson.decode(known).state
if state ~= 'verified' then return cjson.encode({refused = 'state', state = state}) end
if payload.promotes and canary ~= payload.version and moves then
  return cjson.encode({refused = 'canary', active = active})
end
-- The run of a canary that was ended here must see that somebody has decided since it began.
if moves or canary then redis.call('HSET', keys.active, 'epoch', epoch + 1) end
if moves then
  redis.call('HSET', keys.active, 'version', payload.version, 'previous', active or payload.version)
  count('errata_activations_total')
  emit('version.activated', {version = payload.version, previous = active})
  local back = active and payload.version < active
  audit(back and 'version.rolled_back' or 'version.activated', {version = payload.version, previous = active})
end
if canary == payload.version then
  end_canary('promoted')
elseif canary then
  end_canary('overtaken', 'version ' .. payload.version .. ' was activated')
end
return '{}'
