"""Read checkpoint folders: configs, tensor names, adapters, prompt caches."""
