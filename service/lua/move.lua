-- Moves one edit; answers with the status it had when the table refuses.
if move(payload.id, payload.to, payload.fields) then return '{}' end
return cjson.encode({refused = field(payload.id, 'status')})
