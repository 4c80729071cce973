-- Makes the edits agree with the active version. Reads the pointer itself, so it may run at any time and any number of
-- times; the last move of the pointer wins. Looks only at prompts of which something changed: edits that are in one of
-- the version that all agreed with last and the active one and not in the other, and what was put aside since.
local active = redis.call('HGET', keys.active, 'version') or '0'
local settled = redis.call('GET', keys.settled)
local moved, prompts, touched = {}, {}, {}
local CUMULATIVE = {queued = true, training = true, trained = true, live = true}
local function to(id, status, fields)
  if move(id, status, fields) then moved[#moved + 1] = id end
end

local function touch(prompt)
  if not touched[prompt] then
    touched[prompt] = true
    prompts[#prompts + 1] = prompt
  end
end

local function touch_changed(before, now)
  local was = redis.call('GET', keys.version_edits .. before) or ''
  local is = redis.call('GET', keys.version_edits .. now) or ''
  for place = 1, math.max(#was, #is) do
    local changed = bit.bxor(was:byte(place) or 0, is:byte(place) or 0)
    for number = 0, changed == 0 and -1 or 7 do
      if bit.band(changed, bit.rshift(128, number)) ~= 0 then
        local seq = 8 * (place - 1) + number
        for _, id in ipairs(redis.call('ZRANGEBYSCORE', keys.edits, seq, seq)) do touch(field(id, 'prompt_key')) end
      end
    end
  end
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

-- Of these edits of one prompt the last that is in the cumulative set and has another target than this one.
local function last_with_another_target(id, ids)
  local found, seq
  for _, other in ipairs(ids) do
    local of = tonumber(field(other, 'seq'))
    if CUMULATIVE[field(other, 'status')] and field(other, 'target') ~= field(id, 'target') and of > (seq or 0) then
      found, seq = other, of
    end
  end
  return found
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
-- A run that is under way may commit a version with it; one that has ended cannot, whether it gave the edit back or not.
local current = redis.call('GET', keys.current)
for _, id in ipairs(in_status('retracting')) do
  if field(id, 'run') ~= current and not in_version(active, id) then
    redis.call('SREM', keys.prompt .. field(id, 'prompt_key'), id)
    to(id, 'retracted', {run = ''})
  end
end

if not settled then
  for _, status in ipairs({'live', 'held', 'superseded'}) do
    for _, id in ipairs(in_status(status)) do touch(field(id, 'prompt_key')) end
  end
elseif settled ~= active then
  touch_changed(settled, active)
end
for _, prompt in ipairs(redis.call('SMEMBERS', keys.unsettled)) do touch(prompt) end
for _, prompt in ipairs(prompts) do
  local ids = redis.call('SMEMBERS', keys.prompt .. prompt)
  for _, id in ipairs(ids) do
    local status, there = field(id, 'status'), in_version(active, id)
    if status == 'live' and succeeded(id) then
      to(id, 'superseded')
    elseif status == 'live' and not there then
      to(id, 'held')
    elseif status == 'held' and there and field(id, 'verdict') == 'matched' then
      to(id, 'live')
    end
  end
  -- What the rollback went back to is the pair (weights, edit set): an edit whose successors were rolled back, or
  -- withdrawn before they were served, stands again, unless its place is taken by one that says what a successor said.
  for _, id in ipairs(ids) do
    if field(id, 'status') == 'superseded' and field(id, 'verdict') == 'matched' and in_version(active, id) then
      local served, last = succeeded(id)
      if not served and (last == 'held' or last == 'retracted') then
        local taken_by = last_with_another_target(id, ids)
        if taken_by then
          redis.call('HSET', keys.edit .. id, 'superseded_by', taken_by)
        else
          to(id, 'live')
        end
      end
    end
  end
end
if settled ~= active then redis.call('SET', keys.settled, active) end
redis.call('DEL', keys.unsettled)
return list(moved)
