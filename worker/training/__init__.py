"""The trainer: encoding, prefix cache, objective, breadth-first loop. Pure: objects in, objects out."""
