-- Ends a run once; the place of the current run is free again. A run that ends in training gives its edits back at once:
-- in between they would be anybody's to give back, for another reason and at the price of an attempt.
local run = keys.run .. payload.run
local status = redis.call('HGET', run, 'status')
if status ~= 'queued' and status ~= 'training' and status ~= 'verifying' then return '{"ended":true}' end
if payload.only ~= cjson.null and status ~= payload.only then return '{"ended":true}' end
if payload.back ~= cjson.null then unclaim(payload.run, payload.back) end
redis.call('HSET', run, 'status', payload.status, 'phase', '', 'error', payload.error, 'finished_at', context.now)
if redis.call('GET', keys.current) == payload.run then redis.call('DEL', keys.current, keys.lease) end
if redis.call('GET', keys.next) == payload.run then redis.call('DEL', keys.next) end
count('errata_runs_ended_total|' .. payload.status)
if payload.status == 'failed' then count('errata_runs_failed_in_a_row') end
if payload.status == 'succeeded' then redis.call('HDEL', keys.metrics, 'errata_runs_failed_in_a_row') end
emit('run.' .. payload.status, {id = payload.run, version = tonumber(redis.call('HGET', run, 'version'))})
return '{}'
