# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Training: the Trainer and its checkpoints, contexts of any length, sequences split over processes.

A model that is loaded with its own code does not need this folder.
"""
