-- Asks a run to stop, and the triggers to wait for news. Its worker hears of it with the lease.
local run = keys.run .. payload.run
local status = redis.call('HGET', run, 'status')
if status ~= 'queued' and status ~= 'training' then return cjson.encode({refused = status}) end
redis.call('SET', keys.hold, '1')
if redis.call('HGET', run, 'cancel') ~= '1' then audit('run.cancelled', {id = payload.run}) end
redis.call('HSET', run, 'cancel', '1')
return '{}'
