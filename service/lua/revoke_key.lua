-- Takes a key back, once.
if redis.call('HSETNX', keys.api_key .. payload.id, 'revoked_at', context.now) == 1 then
  audit('key.revoked', {id = payload.id, name = redis.call('HGET', keys.api_key .. payload.id, 'name')})
end
return '{}'
