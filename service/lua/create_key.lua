-- Stores an API key; of its secret there is only the hash.
local added = redis.call('HSET', keys.api_key .. payload.id, 'id', payload.id, 'name', payload.name, 'scopes', payload.scopes,
  'secret_sha256', payload.secret_sha256, 'expires_at', payload.expires_at, 'rate', payload.rate,
  'created_at', context.now)
-- The first answer was lost on the way.
if added == 0 then return '{}' end
redis.call('LPUSH', keys.api_keys, payload.id)
audit('key.created', {id = payload.id, name = payload.name, scopes = payload.scopes})
return '{}'
