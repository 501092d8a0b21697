"""Where KV blocks lie below the device pool: host memory and a file, and the threads that move them."""
