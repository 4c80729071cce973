-- Takes a key back, once.
redis.call('HSETNX', keys.api_key .. payload.id, 'revoked_at', context.now)
return '{}'
