"""The ground that the work runs on: Ray sessions, storage, leases, pools of actors."""
