"""The engine: scheduler, batch, runner and sampler of one worker, whatever its role."""
