-- Makes a queued run the current one, if no other is under way: a new fencing token and a lease on it.
local current = redis.call('GET', keys.current)
if current then return cjson.encode({busy = current}) end
local run = keys.run .. payload.run
if redis.call('HGET', run, 'status') ~= 'queued' then return '{"gone":true}' end
local token = redis.call('INCR', keys.token)
redis.call('SET', keys.current, payload.run)
redis.call('DEL', keys.next)
redis.call('SET', keys.lease, token, 'PX', payload.lease_ms)
redis.call('HSET', run, 'status', 'training', 'phase', 'claim', 'token', token, 'started_at', context.now,
  'parent', redis.call('HGET', keys.active, 'version') or '0',
  'epoch_of_activation', redis.call('HGET', keys.active, 'epoch') or '0')
emit('run.training', {id = payload.run})
return cjson.encode({token = token})
