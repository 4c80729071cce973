-- Takes an edit out of the cumulative set; a second time changes nothing. A proposed one was never in it.
if move(payload.id, field(payload.id, 'status') == 'proposed' and 'retracted' or 'retracting') then
  redis.call('DEL', keys.hold)
  audit('edit.retracted', {id = payload.id})
end
return '{}'
