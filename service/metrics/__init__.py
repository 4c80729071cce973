"""What ``GET /metrics`` shows: the catalogue, what is kept in Redis, what is read at a scrape, the service's own."""
