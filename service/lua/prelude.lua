-- Shared by every script: the context, the event stream, the audit log, and the one way to move an edit.
local context = cjson.decode(ARGV[1])
local payload = cjson.decode(ARGV[2])
local keys = context.keys

local function emit(type, data)
  redis.call('XADD', keys.events, 'MAXLEN', '~', context.events_max, '*', 'type', type, 'data', cjson.encode(data))
end

-- Adds to what GET /metrics shows (service/metrics/kept.py names the fields).
local function count(field)
  redis.call('HINCRBY', keys.metrics, field, 1)
end

local function observe(name, bounds, value)
  local bucket = 'inf'
  for _, bound in ipairs(bounds) do
    if value <= bound then bucket = tostring(bound) break end
  end
  count(name .. '|' .. bucket)
  redis.call('HINCRBYFLOAT', keys.metrics, name .. '|sum', value)
end

-- Never trimmed, and written by the script that makes the change: what is not in the log did not happen.
local function audit(action, data)
  redis.call('XADD', keys.audit, '*', 'action', action, 'at', context.now, 'actor', context.actor, 'actor_name',
    context.actor_name, 'request_id', context.request_id, 'run', context.run, 'version',
    redis.call('HGET', keys.active, 'version') or '', 'data', cjson.encode(data))
end

-- cjson writes an empty table as {}; lists go through here.
local function list(values)
  if #values == 0 then return '[]' end
  return cjson.encode(values)
end

local function in_status(status)
  return redis.call('ZRANGE', keys.edits_in .. status, 0, -1)
end

local function field(id, name)
  return redis.call('HGET', keys.edit .. id, name) or ''
end

-- Whether a worker still has its run. It may have slept until another took the run over: then nothing of it counts.
local function holds(run, token)
  return redis.call('GET', keys.current) == run and redis.call('GET', keys.token) == tostring(token)
end

-- What a worker is told that comes to the end of a run's training and may not end it so; nil if it may.
local function past_training(run, token)
  if not holds(run, token) then return '{"refused":"fenced"}' end
  -- The first answer was lost on the way, and what came of it may have been judged since.
  if redis.call('HGET', keys.run .. run, 'status') ~= 'training' then return '{}' end
  -- Whoever cancelled it was told that it stops.
  if redis.call('HGET', keys.run .. run, 'cancel') == '1' then return '{"refused":"cancelled"}' end
end

-- The canary gets no traffic any more. `outcome` is promoted, withdrawn, or overtaken by a call that named a version.
local function end_canary(outcome, reason)
  local version = tonumber(redis.call('HGET', keys.active, 'canary'))
  redis.call('HDEL', keys.active, 'canary')
  redis.call('DEL', keys.canary)
  count('errata_canaries_ended_total|' .. outcome)
  if outcome == 'promoted' then return end
  emit('version.withdrawn', {version = version, reason = reason})
  audit('version.withdrawn', {version = version, reason = reason})
end

-- The training of a run is over: its verification begins.
local function hand_over(run, version)
  redis.call('HSET', keys.run .. run, 'status', 'verifying', 'phase', 'verify', 'version', version,
    'verifying_since', context.now)
  emit('run.verifying', {id = run, version = version})
end

local function in_version(version, id)
  return redis.call('GETBIT', keys.version_edits .. version, field(id, 'seq')) == 1
end

-- Moves an edit if the status table allows it; returns whether it did.
local function move(id, to, fields)
  local from = field(id, 'status')
  if not (context.transitions[from] and context.transitions[from][to]) then return false end
  local key = keys.edit .. id
  redis.call('HSET', key, 'status', to, 'updated_at', context.now)
  for name, value in pairs(fields or {}) do redis.call('HSET', key, name, value) end
  redis.call('ZREM', keys.edits_in .. from, id)
  redis.call('ZADD', keys.edits_in .. to, redis.call('HGET', key, 'seq'), id)
  -- What it had superseded may stand again.
  if to == 'held' or to == 'retracted' then redis.call('SADD', keys.unsettled, field(id, 'prompt_key')) end
  local accepted_at = tonumber(field(id, 'accepted_at'))
  if from == 'trained' and to == 'live' and accepted_at then
    observe('errata_edit_to_live_seconds', context.to_live_bounds, math.max(0, context.now - accepted_at))
  end
  emit('edit.' .. to, {id = id, status = to, from = from, version = tonumber(field(id, 'version'))})
  return true
end

-- Edits that a run has go back to the queue, are held, or fail when their attempts are used up; `run` is null for every
-- run that is not under way. Returns those that moved.
local function unclaim(run, how)
  local current = redis.call('GET', keys.current)
  local moved = {}
  local function theirs(id)
    local of = field(id, 'run')
    if run == cjson.null then return of ~= current end
    return of == run
  end

  local function back(id, status)
    if status == 'trained' and how.trained_to == 'held' then return move(id, 'held', {run = ''}) end
    local attempts = tonumber(field(id, 'attempts'))
    if how.refund then return move(id, 'queued', {run = '', version = '', attempts = attempts - 1}) end
    local to = attempts >= how.max_attempts and 'failed' or 'queued'
    return move(id, to, {run = '', version = '', error = how.error})
  end

  for _, status in ipairs({'training', 'trained'}) do
    for _, id in ipairs(in_status(status)) do
      if theirs(id) and back(id, status) then moved[#moved + 1] = id end
    end
  end
  -- A withdrawn edit that the run carried may now come to rest.
  for _, status in ipairs({'retracting', 'superseded'}) do
    for _, id in ipairs(in_status(status)) do
      if theirs(id) then redis.call('HSET', keys.edit .. id, 'run', '') end
    end
  end
  return moved
end

-- Of several edits of one prompt with different targets the cumulative set has the last one.
local function supersede_others(id)
  for _, other in ipairs(redis.call('SMEMBERS', keys.prompt .. field(id, 'prompt_key'))) do
    if field(other, 'target') ~= field(id, 'target') then move(other, 'superseded', {superseded_by = id}) end
  end
end
