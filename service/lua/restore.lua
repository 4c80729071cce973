-- Puts back the edits of a version that Redis lost; what is there already stays as it is. Called for the newest version
-- first: of several edits of one prompt the one that is there before has succeeded the others.
local function successor(edit)
  for _, other in ipairs(redis.call('SMEMBERS', keys.prompt .. edit.prompt_key)) do
    local status = field(other, 'status')
    if field(other, 'target') ~= edit.target and status ~= 'superseded' and not status:find('^retract') then
      return other
    end
  end
  return ''
end

local restored = {}
for _, edit in ipairs(payload.edits) do
  if redis.call('EXISTS', keys.edit .. edit.id) == 0 then
    local seq, last = edit.seq, tonumber(redis.call('GET', keys.seq) or '0')
    -- An edit that came before the repair may have been given the number.
    if #redis.call('ZRANGEBYSCORE', keys.edits, seq, seq) > 0 then seq = last + 1 end
    if seq > last then redis.call('SET', keys.seq, seq) end
    local by = successor(edit)
    local status = by == '' and 'held' or 'superseded'
    redis.call('HSET', keys.edit .. edit.id, 'id', edit.id, 'seq', seq, 'status', status, 'record', edit.record,
      'target', edit.target, 'prompt_key', edit.prompt_key, 'attempts', 0, 'updated_at', context.now,
      'version', payload.version, 'superseded_by', by)
    redis.call('ZADD', keys.edits, seq, edit.id)
    redis.call('ZADD', keys.edits_in .. status, seq, edit.id)
    redis.call('SADD', keys.prompt .. edit.prompt_key, edit.id)
    emit('edit.' .. status, {id = edit.id, status = status, version = payload.version})
    restored[#restored + 1] = edit.id
  end
end
return list(restored)
