"""Lightning, manual optimization, with the callback: it samples at training batches and counts their examples."""

import lightning
import torch

from ivon_lora import VAdam
from ivon_lora.integrations.lightning import ivon_callback


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hidden, self.out = torch.nn.Linear(8, 32), torch.nn.Linear(32, 2)

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.optimizers().zero_grad()
        loss = torch.nn.functional.cross_entropy(self.out(torch.tanh(self.hidden(batch[0]))), batch[1])
        self.manual_backward(loss)
        self.optimizers().step()
        self.log("loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return VAdam(self.named_parameters(), lr=1e-2, num_examples=len(data))


lightning.seed_everything(0)
data = [(x, int(x.sum() > 0)) for x in torch.randn(256, 8)]
trainer = lightning.Trainer(max_epochs=8, callbacks=[ivon_callback()], logger=False)
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=32, shuffle=True))
