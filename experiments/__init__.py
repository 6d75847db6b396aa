# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The shared parts of scripts/ and benchmarks/: options, texts, saved models, trainings, studies, reports."""
