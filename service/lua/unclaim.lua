-- Ends a run's hold on its edits without a live version. Without a run it is a repair: every run's that is not under way.
return list(unclaim(payload.run, payload))
