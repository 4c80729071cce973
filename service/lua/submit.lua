-- Stores edits, all or none; an idempotency key that is known answers with what it stored. A proposed edit is nobody's
-- successor and in no run until it is approved.
local function stored(ids)
  local found = {}
  for _, id in ipairs(ids) do
    local flat, fields = redis.call('HGETALL', keys.edit .. id), {}
    for place = 1, #flat, 2 do fields[flat[place]] = flat[place + 1] end
    found[#found + 1] = fields
  end
  return '{"edits":' .. list(found) .. '}'
end

local once = payload.idempotency
-- Two clients may number their requests alike: a key is its API key's own.
local kept = once ~= cjson.null and once and keys.idempotency .. context.actor .. ':' .. once.key
if kept then
  local known = redis.call('HMGET', kept, 'body', 'ids')
  if known[1] then
    if known[1] ~= once.body then return '{"reused":true}' end
    return stored(cjson.decode(known[2]))
  end
end

-- A repeated call (the first answer was lost on the way) finds its edits there, perhaps claimed by now.
local ids, new, queued = {}, {}, payload.status == 'queued'
for _, edit in ipairs(payload.edits) do
  ids[#ids + 1] = edit.id
  if redis.call('EXISTS', keys.edit .. edit.id) == 0 then new[#new + 1] = edit end
end
local waiting = 0
for _, status in ipairs({'proposed', 'queued', 'training'}) do
  waiting = waiting + redis.call('ZCARD', keys.edits_in .. status)
end
if #new > 0 and waiting + #new > payload.queue_max_edits then return cjson.encode({waiting = waiting}) end
for _, edit in ipairs(new) do
  local seq = redis.call('INCR', keys.seq)
  redis.call('HSET', keys.edit .. edit.id, 'id', edit.id, 'seq', seq, 'status', payload.status, 'record', edit.record,
    'proposer', context.actor, 'target', edit.target, 'prompt_key', edit.prompt_key, 'attempts', 0,
    'updated_at', context.now, 'accepted_at', context.now, 'request_id', context.request_id)
  if payload.traceparent then redis.call('HSET', keys.edit .. edit.id, 'traceparent', payload.traceparent) end
  redis.call('ZADD', keys.edits, seq, edit.id)
  redis.call('ZADD', keys.edits_in .. payload.status, seq, edit.id)
  emit('edit.' .. payload.status, {id = edit.id, status = payload.status})
  if queued then
    supersede_others(edit.id)
    redis.call('SADD', keys.prompt .. edit.prompt_key, edit.id)
  end
end
if #new > 0 then
  local named = {}
  for _, edit in ipairs(new) do named[#named + 1] = edit.id end
  audit(queued and 'edits.submitted' or 'edits.proposed', {ids = named})
end
if queued and #new > 0 then redis.call('DEL', keys.hold) end

if kept then
  redis.call('HSET', kept, 'body', once.body, 'ids', list(ids))
  redis.call('EXPIRE', kept, once.ttl_s)
end
return stored(ids)
