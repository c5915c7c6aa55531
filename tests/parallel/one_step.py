"""One training step of a small model on a rank, for tests that look at what it sends and holds."""

from ternlm.config import config_from_dict
from ternlm.config.layout import resolve_layout


def settings(changes, world, seq_len=32):
    """Return the config of a small run; `microbatches` is per data-parallel rank where nothing else is parallel."""
    changes = dict(changes)
    table = {
        "model": {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "attention_bias": True,
        },
        "data": {"seq_len": seq_len, "sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]},
        "batch": {"global_sequences": world * changes.pop("microbatches", 1)},
        "train": {"steps": 10},
        "compute": {"dtype": "float32", "compile": "off"},
        "parallel": {"allow_untested": True},
    }
    for section, fields in changes.items():
        table[section] = {**table.get(section, {}), **fields}
    return config_from_dict(table)


class OneStep:
    """A run on this rank of the default group."""

    def __init__(self, config, rank):
        import torch
        import torch.distributed as dist

        from ternlm.optim.groups import build_optimizers
        from ternlm.parallel.mesh import make_mesh
        from ternlm.parallel.pieces import make_pieces
        from ternlm.planner.step_traffic import chunk_tokens
        from ternlm.train.distributed import build_laid_out, fill_pieces
        from ternlm.train.objective import next_token_loss

        self.config, self.device = config, torch.device("cpu")
        self.layout = resolve_layout(config, dist.get_world_size())
        self.mesh = make_mesh(self.layout, rank, self.device)
        self.laid_out = build_laid_out(config, self.mesh, torch.float32, compile_blocks=False)
        pieces = make_pieces(self.laid_out.model, self.mesh, config.parallel.sequence)
        fill_pieces(pieces, config)
        for piece in pieces:
            if piece.name.endswith(".magnitude"):  # of zero, nothing would get a gradient
                piece.shard().detach().fill_(1.0)
        self.pieces = [piece for piece in pieces if piece.parameter.requires_grad]
        self.optimizers = build_optimizers(self.pieces, config.optimizer, self.mesh)
        loss = config.loss.model_copy(update={"chunk_tokens": chunk_tokens(config)})
        self.loss_fn = next_token_loss(loss, torch.ones(config.model.vocab_size, dtype=torch.int32))

    def train(self):
        """Take one step on random tokens, the same on ranks that share them."""
        import torch

        from ternlm.data.batch import Batch
        from ternlm.train.precision import autocast
        from ternlm.train.step import accumulate_gradients, update_weights

        rows, tokens = self.config.batch.microbatch_sequences, self.config.data.seq_len
        names = tuple(source.name for source in self.config.data.sources)
        generator = torch.Generator().manual_seed(self.mesh.place.data)
        batches = []
        for _ in range(self.config.batch.global_sequences // (rows * self.layout.data)):
            ids = torch.randint(self.config.model.vocab_size, (rows, tokens), generator=generator)
            places = torch.arange(tokens).repeat(rows, 1)
            types = torch.zeros(rows, dtype=torch.int64)
            ones = torch.ones(rows, tokens)
            batches.append(Batch(ids, ids.clone(), ones, places, ((tokens,),) * rows, types, names))
        loss = accumulate_gradients(self.laid_out, self.loss_fn, batches, lambda: autocast(self.device, torch.float32))
        norm = update_weights(self.pieces, self.optimizers, self.mesh, 1.0, loss.divisor)
        assert loss.mean > 0
        assert norm > 0
