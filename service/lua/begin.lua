-- Begins where Redis is new or was lost: version 0 is active, and if there is a version to verify again, a run that has
-- only its verification before it has that. Without a pointer nothing of this was done, with one all of it.
if redis.call('EXISTS', keys.active) == 1 then return '{"active":true}' end
redis.call('HSET', keys.active, 'version', 0, 'previous', 0, 'epoch', 1)
count('errata_activations_total')
emit('version.activated', {version = 0})
audit('version.activated', {version = 0})
if payload.version == cjson.null then return '{}' end

local taken = 0
for _, id in ipairs(in_status('held')) do
  if in_version(payload.version, id) then
    move(id, 'trained', {run = payload.run, version = payload.version, attempts = 1, verdict = ''})
    taken = taken + 1
  end
end
redis.call('HSET', keys.run .. payload.run, 'id', payload.run, 'status', 'verifying', 'phase', 'verify',
  'trigger', payload.trigger, 'token', redis.call('INCR', keys.token), 'parent', 0, 'epoch_of_activation', 1,
  'version', payload.version, 'edits', taken, 'new_edits', taken, 'created_at', context.now,
  'started_at', context.now, 'verifying_since', context.now)
redis.call('ZADD', keys.runs, redis.call('INCR', keys.run_seq), payload.run)
redis.call('SET', keys.current, payload.run)
emit('run.verifying', {id = payload.run, version = payload.version})
return '{}'
