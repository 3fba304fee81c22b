"""One PEFT model as two models, adapted and base, that share weights and run in one batch.

The way in: `peft_adapter.Adapter.read(peft_model)` reads the PEFT model once, `pair.pair_models`
builds the runners, and a decoding loop calls `prefill`, `step`, `reorder` and `logits` of what
`pair.Decoder` describes. `module_tree` builds second trees of modules over the same parameters, out
of the layers in `adapter_layers` and `layers/`; `runner` adds the KV cache of `kv_cache`,
`cuda_graphs` replays decode steps on a GPU, and `probe` compares a new pair with the plain models.
Of our own rooms, this one imports only `ops`. PEFT is imported only here, in `training` and in
`integrations`.
"""
