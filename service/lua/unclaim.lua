-- Ends a run's hold on its edits without a live version: back to the queue, held, or failed when the attempts are used up.
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
    if field(id, 'run') == payload.run then back(id, status) end
  end
end
-- A withdrawn edit that the run carried may now come to rest.
for _, status in ipairs({'retracting', 'superseded'}) do
  for _, id in ipairs(in_status(status)) do
    if field(id, 'run') == payload.run then redis.call('HSET', keys.edit .. id, 'run', '') end
  end
end
return '{}'
