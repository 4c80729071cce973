-- Ends a run's hold on its edits without a live version: back to the queue, held, or failed when the attempts are used up.
-- Without a run it is a repair: every run's that is not under way.
local current = redis.call('GET', keys.current)
local moved = {}
local function theirs(id)
  local run = field(id, 'run')
  if payload.run == cjson.null then return run ~= current end
  return run == payload.run
end

local function back(id, status)
  if status == 'trained' and payload.trained_to == 'held' then
    return move(id, 'held', {run = ''})
  end
  local attempts = tonumber(field(id, 'attempts'))
  if payload.refund then
    return move(id, 'queued', {run = '', version = '', attempts = attempts - 1})
  end
  local to = attempts >= payload.max_attempts and 'failed' or 'queued'
  return move(id, to, {run = '', version = '', error = payload.error})
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
return list(moved)
