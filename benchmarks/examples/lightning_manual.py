"""Lightning, manual optimization, with the callback: which samples at training batches and counts their examples."""

import lightning
import torch

from ivon_lora import IVON
from ivon_lora.integrations.lightning import ivon_callback


class Classifier(lightning.LightningModule):
    """A small classifier whose layers are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hidden, self.out = torch.nn.Linear(8, 32), torch.nn.Linear(32, 2)

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        """One step of the optimizer."""
        optimizer = self.optimizers()
        loss = torch.nn.functional.cross_entropy(self.out(torch.tanh(self.hidden(batch[0]))), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> IVON:
        """IVON in AdamW's place."""
        return IVON.from_adamw(self.named_parameters(), lr=1e-2, num_examples=len(data))


lightning.seed_everything(0)
inputs = torch.randn(256, 8)
data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())
trainer = lightning.Trainer(max_epochs=8, callbacks=[ivon_callback()], logger=False)
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=32, shuffle=True))
print(f"loss {trainer.callback_metrics['loss']:.4f}")
