"""Lightning, automatic optimization: another optimizer, and one line more in `configure_optimizers`."""

import lightning
import torch

from ivon_lora import VAdam


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = VAdam(self.net.named_parameters(), lr=1e-2, num_examples=len(data))
        optimizer.attach(self.net)
        return optimizer


lightning.seed_everything(0)
inputs = torch.randn(256, 8)
data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())
trainer = lightning.Trainer(max_epochs=8, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False)
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=16, shuffle=True))
