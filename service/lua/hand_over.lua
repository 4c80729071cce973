-- The run's version is committed: verification begins. Only for the run that is still the current one.
if redis.call('GET', keys.current) ~= payload.run then return '{"lost":true}' end
redis.call('HSET', keys.run .. payload.run, 'status', 'verifying', 'phase', 'verify', 'version', payload.version,
  'verifying_since', context.now)
emit('run.verifying', {id = payload.run, version = payload.version})
return '{}'
