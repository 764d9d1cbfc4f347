"""What knows nothing of models: errors, files, ledgers, the environment, figures. It uses no other stage."""
