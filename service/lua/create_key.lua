-- Stores an API key; of its secret there is only the hash.
redis.call('HSET', keys.api_key .. payload.id, 'id', payload.id, 'name', payload.name, 'scopes', payload.scopes,
  'secret_sha256', payload.secret_sha256, 'expires_at', payload.expires_at, 'rate', payload.rate,
  'created_at', context.now)
redis.call('LPUSH', keys.api_keys, payload.id)
audit('key.created', {id = payload.id, name = payload.name, scopes = payload.scopes})
return '{}'
