-- A run's edits are in a committed version. Those withdrawn meanwhile keep their status.
local moved = {}
for _, id in ipairs(in_status('training')) do
  if field(id, 'run') == payload.run and move(id, 'trained', {version = payload.version}) then moved[#moved + 1] = id end
end
return list(moved)
