"""What tests share: models and data, processes, hosts, a user's module. Nothing here is a test."""
