-- Edits that a run found out to be what it fails by. Those withdrawn meanwhile keep their status.
if not holds(payload.run, payload.token) then return '{"lost":true}' end
local moved = {}
for _, id in ipairs(payload.ids) do
  if field(id, 'run') == payload.run and move(id, 'failed', {run = '', error = payload.error}) then
    moved[#moved + 1] = id
  end
end
return '{"moved":' .. list(moved) .. '}'
