-- Makes the edits agree with the active version. Reads the pointer itself, so it may run at any time and any number of
-- times; the last move of the pointer wins.
local active = redis.call('HGET', keys.active, 'version') or '0'
local moved = {}
local function to(id, status, fields)
  if move(id, status, fields) then moved[#moved + 1] = id end
end

-- Whether one of the edits that came after this one for its prompt is in the active version; and the status of the last.
local function succeeded(id)
  local by, status = field(id, 'superseded_by'), ''
  while by ~= '' do
    if in_version(active, by) then return true end
    by, status = field(by, 'superseded_by'), field(by, 'status')
  end
  return false, status
end

-- The version before may have had the edit too, answered wrong; what counts is the one that its run made.
for _, id in ipairs(in_status('trained')) do
  if field(id, 'version') == active then
    if field(id, 'verdict') == 'matched' then
      to(id, 'live', {run = '', error = ''})
    elseif tonumber(field(id, 'attempts')) >= payload.max_attempts then
      to(id, 'failed', {run = '', error = payload.unverified})
    else
      to(id, 'queued', {run = '', error = payload.unverified})
    end
  end
end
for _, id in ipairs(in_status('live')) do
  if succeeded(id) then
    to(id, 'superseded')
  elseif not in_version(active, id) then
    to(id, 'held')
  end
end
for _, id in ipairs(in_status('held')) do
  if field(id, 'verdict') == 'matched' and in_version(active, id) then to(id, 'live') end
end
for _, id in ipairs(in_status('retracting')) do
  if field(id, 'run') == '' and not in_version(active, id) then
    redis.call('SREM', keys.prompt .. field(id, 'prompt_key'), id)
    to(id, 'retracted')
  end
end
-- What the rollback went back to is the pair (weights, edit set): an edit whose successors were rolled back, or
-- withdrawn before they were served, stands again.
for _, id in ipairs(in_status('superseded')) do
  if field(id, 'verdict') == 'matched' and in_version(active, id) then
    local served, last = succeeded(id)
    if not served and (last == 'held' or last == 'retracted') then to(id, 'live') end
  end
end
return list(moved)
