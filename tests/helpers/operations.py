'''Functions that networks use, and laws that hold for networks which use them.'''

import functools

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlusFlat

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP, with_splitting

RESNET = {
    'ratio': ResNetLRP,
    'symmetric': lambda: ResNetLRP('symmetric'),
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'ones': lambda: ResNetLRP(first_layer='ones'),
    'flat': lambda: ResNetLRP(first_layer='flat'),
    'wsquare': lambda: ResNetLRP(first_layer='wsquare'),
    'zbox': lambda: ResNetLRP(first_layer='zbox', low=-9.0, high=9.0),
    'literal': lambda: ResNetLRP(projection='literal'),
    'drop': lambda: ResNetLRP(dead_units='drop'),
    'average': lambda: ResNetLRP(maxpool='average'),
    'stabilizer': lambda: ResNetLRP(stabilizer=1e-3),
}
RELATIVE = {'relative': RelativeLRP, 'per_position': lambda: RelativeLRP('per_position')}
OTHERS = {'block': BlockLRP, 'zennit': lambda: with_splitting(EpsilonPlusFlat())}


class Network(nn.Module):
    '''A function between layers. The last but one has a dead unit, which spreads relevance over everything.'''

    def __init__(self, function, is_relu=True, is_first=False):
        super().__init__()
        self.first, self.function, self.is_relu = nn.Conv2d(3, 4, 3), function, is_relu
        self.is_first = is_first
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))
        self.transposed = nn.ConvTranspose2d(4, 5, (2, 3), (2, 1), (0, 1), (1, 0))
        self.double().eval()
        with torch.no_grad():
            size = self.features(torch.rand(2, 3, 8, 8).double())[0].numel()
        self.hidden, self.head = nn.Linear(size, 4).double(), nn.Linear(4, 3).double()
        with torch.no_grad():
            self.hidden.weight[0] = -self.hidden.weight[0].abs()
            self.hidden.bias[0] = 99.0
            self.head.weight[:, 0].abs_()

    def features(self, x):
        '''What the function makes of the first layer, or of the input.'''
        h = x if self.is_first else self.first(x)
        return self.function(h.relu() if self.is_relu else h, self)

    def forward(self, x):
        '''Logits.'''
        return self.head(self.hidden(self.features(x).reshape(len(x), -1)).relu())


def explain(model, x, composite):
    '''Output and relevance, which starts at one.'''
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(x, lambda output: torch.eye(output.shape[1]).to(output)[[1, 2][: len(x)]])
    return output, relevance


def build(function, **settings):
    '''A network with the same parameters for each function with an output of the same size.'''
    torch.default_generator.manual_seed(1)
    return Network(function, **settings)


def images():
    '''Two images.'''
    torch.default_generator.manual_seed(2)
    return torch.rand(2, 3, 8, 8).double() - 0.3


def check(function, composite, is_conserved=True, alone=(0, 1), **settings):
    '''All laws that hold for one network, and for those examples alone.'''
    model, x = build(function, **settings), images()
    with torch.no_grad():
        expected = model(x)
    output, relevance = explain(model, x, composite())
    assert torch.equal(output.detach(), expected)
    assert relevance.isfinite().all()
    if is_conserved:
        assert torch.allclose(relevance.sum((1, 2, 3)), torch.ones(2).double(), atol=1e-9, rtol=0)
    for num in alone:
        # the kernels of a single example may be others
        with Gradient(model=model, composite=composite()) as attributor:
            _, single = attributor(x[num : num + 1], lambda output, num=num: torch.eye(3).to(output)[[num + 1]])
        assert torch.allclose(relevance[num], single[0], atol=1e-9, rtol=1e-6)


index = torch.arange(4) % 2
spots = torch.tensor([0, 7, 3, 12, 30, 31])
mask = torch.arange(36).view(6, 6) % 3 > 0
adjacency = torch.linspace(-1, 1, 36).double().view(6, 6)
attention = nn.MultiheadAttention(36, 3, batch_first=True, bias=False).double().eval().requires_grad_(False)


def inplace(name, *args, **kwargs):
    '''A method that changes its tensor.'''

    def function(h, net):
        h = h.clone()
        getattr(h, name)(*args, **kwargs)
        return h

    return function


def change(tensor, name='fill_diagonal_', value=0.0):
    '''A tensor that is changed in place.'''
    tensor = tensor.clone()
    getattr(tensor, name)(*(() if name == 'zero_' else (value,)))
    return tensor


def assigned(h, net):
    '''Elements that were written among zeros.'''
    output = h.new_zeros(len(h), 6, 6, 6)
    output[:, 1:3] = h[:, :2]
    output[:, 4:, 1:] = h[:, 2:, 1:]
    return output


def zeroed(h, net):
    '''Zeros that were written among elements.'''
    h = h.clone()
    h[:, 1] = 0
    h[..., 2:4] = 0.0
    return h


PRODUCTS = {
    'h @ W.T': lambda h, net: h.mean((2, 3)) @ net.weight.T,
    '@ matrix': lambda h, net: h @ adjacency,
    'matrix @': lambda h, net: adjacency @ h,
    'matmul other=': lambda h, net: torch.matmul(h, other=adjacency),
    'matmul input=': lambda h, net: torch.matmul(input=adjacency, other=h),
    '__rmatmul__': lambda h, net: h.__rmatmul__(adjacency),
    'bmm': lambda h, net: torch.bmm(h.flatten(2), torch.ones(len(h), 1, 1).double() * net.weight.new_ones(1, 36, 2)),
    'mv': lambda h, net: torch.mv(h.flatten(1), torch.linspace(-1, 1, 144).double()),
    'matmul vector': lambda h, net: h @ adjacency[0],
    'inner': lambda h, net: torch.inner(h, adjacency),
    'tensordot': lambda h, net: torch.tensordot(h, net.weight, ([1], [1])),
    'tensordot left': lambda h, net: torch.tensordot(net.weight, h, ([1], [1])).movedim(1, 0),
    'vecdot': lambda h, net: torch.linalg.vecdot(h, adjacency),
    'kron': lambda h, net: torch.kron(h, net.weight[:2, :2]),
    'einsum': lambda h, net: torch.einsum('bchw,kc->bkhw', h, net.weight),
    'einsum ...': lambda h, net: torch.einsum('...w,wv->...v', h, adjacency),
    'einsum three': lambda h, net: torch.einsum('bchw,kc,hg->bkgw', h, net.weight, adjacency),
    'einsum implicit': lambda h, net: torch.einsum('bcij,jk', h, adjacency),
    'einsum list': lambda h, net: torch.einsum('bchw,wv->bchv', [h, adjacency]),
    'einsum numbers': lambda h, net: torch.einsum(h, [0, 1, 2, 3], adjacency, [3, 4], [0, 1, 2, 4]),
    'einsum sum': lambda h, net: torch.einsum('bchw->bc', h),
    'einsum permutation': lambda h, net: torch.einsum('bchw->bhwc', h),
    'chain_matmul': lambda h, net: torch.chain_matmul(h.mean((2, 3)), net.weight.T, net.weight),
    'multi_dot': lambda h, net: torch.linalg.multi_dot([h.mean((2, 3)), net.weight.T, net.weight]),
    'addmm': lambda h, net: torch.addmm(net.bias, h.mean((2, 3)), net.weight.T),
    'addmm beta alpha': lambda h, net: torch.addmm(net.bias, h.mean((2, 3)), net.weight.T, beta=0.5, alpha=-2.0),
    'addmm method': lambda h, net: net.bias.addmm(h.mean((2, 3)), mat2=net.weight.T),
    'addmm of two': lambda h, net: torch.addmm(h.amax((2, 3)), h.mean((2, 3)), net.weight[:4], beta=2, alpha=0.3),
    'addmm added': lambda h, net: torch.addmm(h.amax((2, 3)), torch.ones(len(h), 5).double(), net.weight, beta=2),
    'addmm_': lambda h, net: h.sum((2, 3)).addmm_(h.mean((2, 3)), net.weight[:4]),
    'addmv': lambda h, net: torch.addmv(torch.ones(1).double(), h.mean((2, 3)), net.weight[0]),
    'baddbmm': lambda h, net: torch.baddbmm(adjacency, h.mean(1), adjacency.expand(len(h), 6, 6), alpha=2),
    'bilinear': lambda h, net: F.bilinear(
        h.mean((2, 3)), net.weight[:1].expand(len(h), -1), adjacency[:4, :4].expand(3, 4, 4)
    ),
    'conv_transpose2d': lambda h, net: F.conv_transpose2d(
        h, net.weight.T[:, :, None, None], stride=2, output_padding=1
    ),
    'conv_transpose1d': lambda h, net: F.conv_transpose1d(
        h.flatten(2), net.weight.T[:, :, None].expand(-1, -1, 3), net.bias, 2, 1
    ),
    'attention bmm': lambda h, net: torch.bmm(h.flatten(2), h.flatten(2).mean(1)[:, :, None].softmax(1)),
    'attention @': lambda h, net: h.flatten(2).mean(1, keepdim=True).softmax(2) @ h.flatten(2).mT,
    'attention einsum': lambda h, net: torch.einsum('bcp,bp->bc', h.flatten(2), h.flatten(2).mean(1).softmax(1)),
    'product': lambda h, net: h * h.flip(1),
    'product_': lambda h, net: h.clone().mul_(h.flip(1)),
    'product of shapes': lambda h, net: h.mean(1, keepdim=True).unflatten(3, (6, 1)) * h.mean(1)[:, None, :, None],
    'matmul of two': lambda h, net: h @ h.mT.flip(1),
    'einsum of two': lambda h, net: torch.einsum('bchw,bchw->bhw', h, h),
    'einsum product': lambda h, net: torch.einsum('bchw,bchv->bchwv', h, h.flip(1)),
    'bmm of itself': lambda h, net: torch.bmm(h.mean(1), h.mean(1)),
    'baddbmm of two': lambda h, net: torch.baddbmm(h[:, 0], h[:, 1], h[:, 2], alpha=0.5),
    'sigmoids @': lambda h, net: h.sigmoid() @ h.flip(1).sigmoid(),
    'attention': lambda h, net: (h @ h.mT).softmax(-1) @ h.flip(1),
    'attention of heads': lambda h, net: torch.einsum('kc,bchw->bkhw', net.weight[:4], (h @ h.mT).softmax(-1)) @ h,
    'linear attention': lambda h, net: h.relu() @ (h.mT.relu() @ h.flip(1)),
    'scaled_dot_product': lambda h, net: F.scaled_dot_product_attention(h, h.flip(1), h.flip(2)),
    'scaled_dot_product mask': lambda h, net: F.scaled_dot_product_attention(h, h.flip(1), h.flip(2), adjacency > 0.1),
    'scaled_dot_product bias': lambda h, net: F.scaled_dot_product_attention(h, h, h, attn_mask=adjacency, scale=2.0),
    'scaled_dot_product causal': lambda h, net: F.scaled_dot_product_attention(h, h, value=h, is_causal=True),
    'experts': lambda h, net: torch.cat([
        F.conv2d(elem, (elem.mean((2, 3)).sigmoid() @ net.weight[:4]).view(4, 1, 1, 1), groups=4)
        for elem in h.split(1)
    ]),
    'multi_head': lambda h, net: attention(*[h.flatten(2)] * 3)[0],
    'multi_head kv': lambda h, net: attention(
        *(elem.flatten(2) for elem in (h, h.flip(1), h.flip(2))), need_weights=False
    )[0],
    'tanh gate': lambda h, net: torch.einsum('bcp,bp->bc', h.flatten(2), h.flatten(2).mean(1).tanh()),
    'linear_cross': lambda h, net: F.linear(h, adjacency),
    'squared': lambda h, net: h * h,
    'reciprocal': lambda h, net: 1 / (h.abs() + 1),
    'lerp': lambda h, net: torch.lerp(h, h.flip(1), h.sigmoid()),
    'lerp number': lambda h, net: h.lerp(h.flip(1), 0.3),
    'lerp_': lambda h, net: h.clone().lerp_(end=h.flip(1), weight=0.3),
    'addcmul': lambda h, net: torch.addcmul(h, h.flip(1), h.sigmoid(), value=0.5),
    'addcmul constant': lambda h, net: torch.addcmul(torch.ones(6).double(), h, adjacency),
    'addcdiv': lambda h, net: torch.addcdiv(h, h.flip(1), h.abs() + 1, value=-0.5),
    'cosine_similarity': lambda h, net: F.cosine_similarity(h.mean((2, 3))[:, None], net.weight, dim=-1),
    'pairwise_distance': lambda h, net: F.pairwise_distance(h.mean((2, 3)), net.weight[:1]),
    'cdist': lambda h, net: torch.cdist(h.flatten(2).mT, net.weight),
    'dist': lambda h, net: torch.stack([torch.dist(elem, adjacency) for elem in h]),
    'diff': lambda h, net: h.diff(dim=3),
    'diff twice': lambda h, net: torch.diff(h, 2, 2, prepend=h[:, :, :1]),
    'lp_pool2d': lambda h, net: F.lp_pool2d(h.abs(), 3.0, 2),
    'lp_pool1d': lambda h, net: F.lp_pool1d(h.abs().flatten(2), 2.0, 3, 2),
}
if 'enable_gqa' in F.scaled_dot_product_attention.__doc__:
    # from PyTorch 2.5 on
    PRODUCTS['scaled_dot_product groups'] = lambda h, net: F.scaled_dot_product_attention(
        h, h[:, :2], h[:, 2:], enable_gqa=True
    )
MOVES = {
    'as_tensor': lambda h, net: torch.as_tensor(h),
    '+h': lambda h, net: +h,
    'nan_to_num': lambda h, net: h.nan_to_num(),
    'asarray': lambda h, net: torch.asarray(h),
    'topk': lambda h, net: h.flatten(2).topk(5).values,
    'sort': lambda h, net: h.flatten(2).sort(-1)[0],
    'msort': lambda h, net: h.transpose(0, 3).msort().transpose(0, 3),
    'kthvalue': lambda h, net: h.kthvalue(2, -1)[0],
    'median': lambda h, net: h.median(2).values,
    'mode': lambda h, net: h.mode(3).values,
    'quantile': lambda h, net: h.quantile(0.4, 3, interpolation='lower'),
    'amin': lambda h, net: h.amin((2, 3)),
    'amin axis': lambda h, net: h.amin(axis=-1),
    'min': lambda h, net: h.flatten(2).min(2)[0],
    'aminmax': lambda h, net: torch.cat(h.aminmax(dim=3), 1),
    'cummax': lambda h, net: h.cummax(3)[0],
    'max const': lambda h, net: torch.maximum(h, torch.full((6,), 0.1).double()),
    'min const': lambda h, net: torch.min(h, h.new_tensor(0.1)),
    'flip': lambda h, net: torch.flipud(torch.fliplr(h.movedim(0, -1))).movedim(-1, 0),
    'split_with_sizes': lambda h, net: h.split_with_sizes([1, 3], 1)[1],
    'hsplit': lambda h, net: h.hsplit(2)[1],
    'diagonal': lambda h, net: h.diagonal(dim1=-2, dim2=-1),
    'swapaxes': lambda h, net: h.swapaxes(-1, 1),
    'take_along_dim': lambda h, net: torch.take_along_dim(h, h.argsort(3), 3),
    'where': lambda h, net: torch.where(h > 0.1, h, 0.0),
    'where keyword': lambda h, net: torch.where(condition=mask, input=h, other=torch.zeros(1).double()),
    'where self': lambda h, net: h.where(mask, h.new_zeros(())),
    'where flipped': lambda h, net: torch.where(mask, 0.0, h),
    'where two': lambda h, net: torch.where(h > 0.1, h, h.flip(3)),
    'masked_fill': lambda h, net: h.masked_fill(h < 0.1, 0.0),
    'masked_fill_': inplace('masked_fill_', mask, 0.0),
    'masked_scatter': lambda h, net: h.masked_scatter(mask >= 0, h.flip(1)),
    'index_fill': lambda h, net: h.index_fill(1, torch.tensor([0, 2]), 0.0),
    'index_fill_': inplace('index_fill_', -1, torch.tensor([0]), 0.0),
    'tril': lambda h, net: h.tril(),
    'triu_': inplace('triu_', 1),
    'diag_embed': lambda h, net: h.mean(2).diag_embed(),
    'max_unpool2d': lambda h, net: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
    'scatter': lambda h, net: (
        torch.zeros(len(h), 9, 6, 6)
        .double()
        .scatter(1, (index + torch.tensor([0, 0, 2, 2]))[None, :, None, None].expand_as(h), h)
    ),
    'index_copy': lambda h, net: h.new_zeros(len(h), 6, 6, 6).index_copy(1, torch.tensor([0, 5, 2, 3]), h),
    'index_copy two': lambda h, net: h.index_copy(1, torch.tensor([0, 1, 2, 3]), h.flip(1)),
    'index_put': lambda h, net: h.index_put((torch.arange(len(h)), torch.tensor(1)), h.new_zeros(())),
    'select_scatter': lambda h, net: h.new_zeros(h.shape).select_scatter(h[:, 0], 1, 2),
    'slice_scatter': lambda h, net: h.new_zeros(len(h), 6, 6, 6).slice_scatter(h, 1, 1, 5),
    'index_put accumulated': lambda h, net: h.new_zeros(h.shape).index_put(
        (torch.arange(len(h))[:, None], index), h, True
    ),
    'put_': lambda h, net: h.new_zeros(h.shape).put_(torch.arange(h.numel()) // 2 * 2, h, accumulate=True),
    'index_put of two': lambda h, net: h.index_put((torch.arange(len(h))[:, None], index), h.flip(1), accumulate=True),
    'fill_diagonal_': lambda h, net: torch.stack([change(elem.mean(0)) for elem in h]),
    'zero_': lambda h, net: h + change(h, 'zero_'),
    'relu_ input=': lambda h, net: torch.relu_(input=h * 1),
    'multi_dot tensors=': lambda h, net: torch.linalg.multi_dot(tensors=[h.mean((2, 3)), net.weight.T, net.weight]),
    'sparse': lambda h, net: torch.sparse.mm(adjacency[:4, :4].to_sparse(), h.mean((2, 3)).T).T,
    'segment_reduce': lambda h, net: torch.segment_reduce(
        h.mean((2, 3)), reduce='sum', lengths=torch.tensor([[1, 3]]).expand(len(h), 2), axis=1
    ),
    'assigned': assigned,
    'zeroed': zeroed,
    'unfold': lambda h, net: F.unfold(h, 3, padding=1, stride=2),
    'fold': lambda h, net: F.fold(F.unfold(h, 3, stride=1), (6, 6), 3),
    'fold with holes': lambda h, net: F.fold(h.flatten(2)[:, :, :4], (4, 4), 1, stride=3),
    'cumsum': lambda h, net: h.cumsum(3),
    'cumsum_': inplace('cumsum_', -1),
    'trapezoid': lambda h, net: torch.trapezoid(h, dim=3),
    'cumulative_trapezoid': lambda h, net: torch.cumulative_trapezoid(h, dim=2),
    'nansum': lambda h, net: h.nansum(3),
    'nanmean': lambda h, net: h.nanmean((2, 3)),
    'index_add': lambda h, net: torch.zeros_like(h).index_add(1, index, h),
    'index_add_': lambda h, net: h.clone().index_add_(1, index, h.flip(1), alpha=0.5),
    'index_add constant': lambda h, net: torch.ones_like(h).index_add(1, index, h),
    'scatter_add': lambda h, net: torch.zeros_like(h).scatter_add(1, index[None, :, None, None].expand_as(h), h),
    'scatter_add of two': lambda h, net: h.scatter_add(1, index[None, :, None, None].expand_as(h), h.flip(1)),
    'scatter_add_': lambda h, net: torch.zeros_like(h).scatter_add_(1, index[None, :, None, None].expand_as(h), src=h),
    'scatter_reduce sum': lambda h, net: torch.zeros_like(h).scatter_reduce(
        1, index[None, :, None, None].expand_as(h), h, 'sum'
    ),
    'scatter_reduce mean': lambda h, net: torch.zeros_like(h).scatter_reduce(
        1, index[None, :, None, None].expand_as(h), h, reduce='mean', include_self=False
    ),
    'out': lambda h, net: torch.add(h, h.flip(1), out=torch.empty_like(h.detach())),
    'getitem mask': lambda h, net: h[:, :, mask],
    'slice': lambda h, net: torch.ops.aten.slice.Tensor(h, 2, 0, 6, 2),
}
ELEMENTS = {
    name: (lambda name: lambda h, net: getattr(h, name)())(name)
    for name in (
        'abs square exp expm1 sin cos tanh erf sinc sign floor round ceil trunc frac deg2rad atan sinh neg asinh'
    ).split()
}
ELEMENTS.update(
    {
        'abs()': lambda h, net: abs(h),
        'log1p': lambda h, net: h.abs().log1p(),
        'log': lambda h, net: (h.abs() + 0.1).log(),
        'sqrt': lambda h, net: (h.abs() + 0.1).sqrt(),
        'rsqrt': lambda h, net: (h.abs() + 0.1).rsqrt(),
        'reciprocal': lambda h, net: (h.abs() + 0.1).reciprocal(),
        'h ** 2': lambda h, net: h**2,
        'pow(exponent=)': lambda h, net: torch.pow(h, exponent=3),
        '2 ** h': lambda h, net: 2**h,
        'pow(p, h)': lambda h, net: torch.pow(torch.tensor(2.0).double(), h),
        'pow_': inplace('pow_', 2),
        'exp_': inplace('exp_'),
        'abs_': inplace('abs_'),
        'float_power': lambda h, net: h.float_power(2),
        'fmod': lambda h, net: h.fmod(0.3),
        'h % c': lambda h, net: h % 0.3,
        'hypot': lambda h, net: h.hypot(torch.ones(1).double()),
        'atan2': lambda h, net: h.atan2(torch.ones(1).double()),
        'copysign': lambda h, net: h.copysign(torch.ones(1).double()),
        'fake_quantize': lambda h, net: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127),
        'expit': lambda h, net: torch.special.expit(h),
        'logit': lambda h, net: h.sigmoid().logit(),
        'i0e': lambda h, net: torch.special.i0e(h),
        'GeM': lambda h, net: h.clamp(min=1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3),
        'c / h': lambda h, net: 2.0 / (h.abs() + 1),
        'div(c, h)': lambda h, net: torch.div(torch.ones(1).double(), h.abs() + 1),
        'std': lambda h, net: h.std((2, 3)),
        'std keepdim': lambda h, net: h.std(-1, keepdim=True),
        'var': lambda h, net: torch.var(h, dim=3, correction=0),
        'std_mean': lambda h, net: torch.cat(torch.std_mean(h, (2, 3)), 1),
        'var_mean': lambda h, net: torch.cat(torch.var_mean(h, dim=-1), 1),
        'norm': lambda h, net: h.norm(dim=1),
        'norm p': lambda h, net: torch.norm(h, 3, -1),
        'norm inf': lambda h, net: h.norm(float('inf'), dim=(2, 3)),
        'linalg.norm': lambda h, net: torch.linalg.norm(h, dim=1),
        'vector_norm': lambda h, net: torch.linalg.vector_norm(h, 1, (1, 2)),
        'matrix_norm': lambda h, net: torch.linalg.matrix_norm(h),
        'logsumexp': lambda h, net: h.logsumexp((2, 3)),
        'norm of zeros': lambda h, net: (h * 0).norm(dim=1),
    }
)
SAMPLES = {
    'grid_sample': lambda h, net: F.grid_sample(
        h, torch.linspace(-1.5, 1.5, 50).double().view(1, 5, 5, 2).expand(len(h), -1, -1, -1), align_corners=False
    ),
    'grid_sample nearest': lambda h, net: F.grid_sample(
        h, torch.linspace(-1, 1, 50).double().view(1, 5, 5, 2).expand(len(h), -1, -1, -1), 'nearest', 'border', False
    ),
    'transformer': lambda h, net: F.grid_sample(
        h,
        F.affine_grid(torch.eye(2, 3).double() + h.mean((2, 3))[:, :1, None] / 9, h.shape, False),
        align_corners=False,
    ),
    'affine_grid': lambda h, net: F.affine_grid(
        h.flatten(1)[:, :6].view(-1, 2, 3), (len(h), 1, 3, 4), align_corners=False
    ),
}
for _mode in ('nearest', 'bilinear', 'bicubic', 'area', 'nearest-exact'):
    SAMPLES[_mode] = functools.partial(lambda h, net, mode: F.interpolate(h, scale_factor=1.7, mode=mode), mode=_mode)
SAMPLES.update(
    {
        'bicubic antialias': lambda h, net: F.interpolate(h, (4, 9), mode='bicubic', antialias=True),
        'bicubic corners': lambda h, net: F.interpolate(h, (9, 4), mode='bicubic', align_corners=True),
        'bilinear antialias': lambda h, net: F.interpolate(h, (4, 3), mode='bilinear', antialias=True),
        'Upsample': lambda h, net: nn.Upsample(scale_factor=(2, 1.5), mode='bicubic')(h),
        'recompute': lambda h, net: F.interpolate(h, scale_factor=1.3, mode='bicubic', recompute_scale_factor=True),
        'linear': lambda h, net: F.interpolate(h.flatten(2), 50, mode='linear'),
        'trilinear': lambda h, net: F.interpolate(h[:, None], (3, 8, 5), mode='trilinear'),
    }
)


def regions(h):
    '''Two boxes for each image. One is outside.'''
    return [
        torch.tensor([[0.0, 0, 4, 4], [20, 20, 30, 30]]).double(),
        torch.tensor([[1.0, 1, 5, 5], [2, 0, 6, 3]]).double(),
    ][: len(h)]


REGIONS = {
    'roi_align': lambda h, net: torchvision.ops.roi_align(h, regions(h), 2),
    'roi_pool': lambda h, net: torchvision.ops.roi_pool(h, regions(h), 2),
    'ps_roi_align': lambda h, net: torchvision.ops.ps_roi_align(h, regions(h), 2),
}
SAMPLES['deform_conv2d'] = lambda h, net: torchvision.ops.deform_conv2d(
    h, h.repeat(1, 5, 1, 1)[:, :18], stretched(net), net.bias, 1, 1, mask=h.repeat(1, 3, 1, 1)[:, :9].sigmoid()
)


def stretched(net):
    '''A kernel of 3 x 3 with weights of both signs.'''
    return net.weight[:, :, None, None] * torch.linspace(-1, 1, 9).double().view(3, 3)


FUNCTIONS = {**PRODUCTS, **MOVES, **ELEMENTS, **SAMPLES}
