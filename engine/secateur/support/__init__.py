"""Helpers that know nothing of models: errors, files, ledgers, the environment, figures. They import no other stage."""
