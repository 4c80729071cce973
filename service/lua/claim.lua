-- Gives every queued edit to a run, and names the whole set that the run trains.
local claimed = in_status('queued')
for _, id in ipairs(claimed) do
  move(id, 'training', {run = payload.run, attempts = field(id, 'attempts') + 1})
end
local members = {}
for _, status in ipairs({'live', 'trained'}) do
  for _, id in ipairs(in_status(status)) do members[#members + 1] = id end
end
for _, id in ipairs(claimed) do members[#members + 1] = id end
return '{"claimed":' .. list(claimed) .. ',"members":' .. list(members) .. '}'
