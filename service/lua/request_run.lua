-- One queued run at most: who asks while one waits gets that one.
local waiting = redis.call('GET', keys.next)
redis.call('DEL', keys.hold)
if waiting then return cjson.encode({run = waiting}) end
local run = keys.run .. payload.run
redis.call('HSET', run, 'id', payload.run, 'status', 'queued', 'trigger', payload.trigger, 'created_at', context.now)
redis.call('ZADD', keys.runs, redis.call('INCR', keys.run_seq), payload.run)
redis.call('SET', keys.next, payload.run)
emit('run.queued', {id = payload.run, trigger = payload.trigger})
audit('run.requested', {id = payload.run, trigger = payload.trigger})
return cjson.encode({run = payload.run, created = true})
