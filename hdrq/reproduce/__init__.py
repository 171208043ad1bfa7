"""Which of the paper's claims hold here: tasks, a fair protocol, runs as jobs, tables from their rows."""
