"""How Alembic runs the migrations: in the transaction of the connection that `sliplm.registry.database` gives it."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
