-- Gives every queued edit to a run, and names the whole set that the run trains. A repeated call (the first answer was
-- lost on the way) names what the run has already. A run that was taken over gets nothing: nobody would give it back.
local status = redis.call('HGET', keys.run .. payload.run, 'status')
if status and status ~= 'training' then return '{"lost":true}' end
for _, id in ipairs(in_status('queued')) do
  move(id, 'training', {run = payload.run, attempts = field(id, 'attempts') + 1, verdict = ''})
end
local claimed, members = {}, {}
for _, name in ipairs({'live', 'trained'}) do
  for _, id in ipairs(in_status(name)) do members[#members + 1] = id end
end
for _, id in ipairs(in_status('training')) do
  if field(id, 'run') == payload.run then
    claimed[#claimed + 1], members[#members + 1] = id, id
  end
end
return '{"claimed":' .. list(claimed) .. ',"members":' .. list(members) .. '}'
