'''What benchmarks/sweep.py runs: functions, layers, and groups of twins, as code.

Code is in terms of tensors that depend on the input (all but the last line of them derived from h and g), each with a
batch of two examples, and of constants:

    h, g        images (2, 8, 6, 6), two convolutions of the input. There is a network with their ReLU, and one without
    s           a gate of that shape, a sigmoid of a third convolution
    u, w        vectors (2, 8) of h and of g
    v           sequences (2, 8, 12) of h
    d           volumes (2, 2, 4, 6, 6) of h
    m, n        matrices (2, 6, 6) of h and of g
    p, q, t     images of h with values above zero, in (-1, 1), and above one
    c, C, B     parameters (8, 1, 1), (8, 6, 6), (6, 6)
    W, b        parameters (5, 8), (5,)
    K, K1, K3   parameters of convolutions (4, 8, 3, 3), (4, 8, 3), (4, 2, 3, 3, 3)
    T, T1, T3   those of transposed ones (8, 4, 3, 3), (8, 4, 3), (2, 4, 3, 3, 3)
    o, i        buffers: a mask (6, 6), indices (4,) below six
    mu, var     buffers of a batch normalization (8,)
    boxes       one box for each image, of shape (2, 5)

A line is the name of a function, and forms of its call. `~` before a name: it is no linear layer, though it is linear.
'''
# ruff: noqa: E501
import re

FUNCTIONS = {
    'moves': '''
view: h.view(2, -1) | h.view(size=(2, 4, -1)) | h.view_as(d)
reshape: h.reshape(2, -1) | torch.reshape(h, shape=(2, 72, 4)) | h.reshape_as(other=d)
flatten: h.flatten(1) | torch.flatten(h, start_dim=-3) | h.unflatten(1, (2, 4)) | h.unflatten(dim=-3, sizes=(4, -1))
permute: h.permute(0, 2, 3, 1) | torch.permute(h, dims=(0, -1, 1, 2)) | h.transpose(1, -1) | h.swapaxes(1, 2) | h.swapdims(1, 2)
permute again: h.movedim(1, -1) | torch.moveaxis(h, source=1, destination=2) | m.mT | m.adjoint() | h.mH | m.transpose_(1, 2)
t: torch.stack([u[0].t(), u[1].t()]) | u.T.T | u.t().t() | torch.t(u).t()
squeeze: h[:, :1].squeeze(1) | torch.squeeze(h[..., :1]) | h.unsqueeze(2) | torch.unsqueeze(h, dim=-1) | h.clone().unsqueeze_(1)
clone: h.clone() | torch.clone(h, memory_format=torch.channels_last) | h.contiguous() | torch.ops.aten.clone(h)
to: h.to(torch.double) | h.double() | h.type(torch.double) | h.type_as(C) | h.cpu() | h.to(C)
as_tensor: torch.as_tensor(h) | torch.asarray(h) | h.as_subclass(torch.Tensor)
positive: +h | torch.positive(h) | h.positive() | h.resolve_conj() | h.resolve_neg() | h.conj() | h.real
nan_to_num: torch.nan_to_num(h) | h.nan_to_num(nan=1.) | h.clone().nan_to_num_()
chunk: h.chunk(2, 1)[0] | torch.chunk(h, chunks=2, dim=-1)[1] | h.unsafe_chunk(2, 1)[0] | h.tensor_split(3, dim=1)[1]
split: h.split(4, 1)[1] | torch.split(h, [2, 6], dim=-3)[1] | h.split_with_sizes([2, 6], 1)[1] | h.hsplit(2)[0] | h.unsafe_split(4, 1)[0]
vsplit: h.dsplit(2)[1] | h.unbind(1)[2] | torch.unbind(h, dim=-1)[0]
narrow: h.narrow(1, 2, 3) | torch.narrow(h, dim=-1, start=0, length=3) | h.select(1, 2) | torch.select(h, dim=-1, index=0) | h.narrow_copy(1, 0, 4)
index_select: h.index_select(2, i) | torch.index_select(h, dim=-1, index=i) | h[:, :, i] | h[..., i, :] | h[:, [0, 2]] | h[:, None, 1:] | h[..., -1]
mask: h[:, :, o] | h[..., o] | h[:, :, ~o] | torch.stack([a.masked_select(o) for a in h])
gather: h.gather(1, (h > .3).long()) | torch.gather(h, dim=-1, index=(h > .3).long()) | h.take_along_dim((h > .3).long(), 1)
take: torch.stack([a.take(i) for a in h]) | torch.take(h, torch.arange(576).reshape(2, -1))
expand: u[:, :, None].expand(-1, -1, 3) | u[:, None].expand(size=(2, 4, 8)) | u[:, None].expand_as(u[:, None].repeat(1, 2, 1)) | torch.broadcast_to(u[:, None], (2, 3, 8))
repeat: h.repeat(1, 2, 1, 1) | h.repeat_interleave(2, 1) | torch.repeat_interleave(h, repeats=2, dim=-1) | h.tile((1, 2, 1, 1)) | torch.broadcast_tensors(u[:, None], C[0, :3, :1])[0]
roll: h.roll(1, 2) | torch.roll(h, shifts=(1, 2), dims=(-1, -2)) | h.flip(3) | torch.flip(h, dims=(-1, 1)) | torch.fliplr(h) | h.fliplr() | h.rot90(1, (2, 3)) | torch.flipud(u.t()).t()
unfold: h.unfold(2, 2, 2) | h.unfold(dimension=-1, size=3, step=1) | F.unfold(h, 2, stride=2) | F.unfold(input=h, kernel_size=3, padding=1) | nn.Unfold(3)(h)
fold: F.fold(F.unfold(h, 2, stride=2), (6, 6), 2, stride=2) | F.fold(input=F.unfold(h, 3), output_size=(6, 6), kernel_size=3)
as_strided: h.contiguous().as_strided((2, 4), (288, 1)) | torch.as_strided(h.contiguous(), size=(2, 4), stride=(288, 2), storage_offset=3)
pixel_shuffle: F.pixel_shuffle(h, 2) | F.pixel_unshuffle(h, downscale_factor=2) | F.channel_shuffle(h, 2) | torch.channel_shuffle(h, groups=4)
diagonal: m.diagonal(dim1=1, dim2=2) | torch.diagonal(m, 1, -1, -2) | torch.stack([a.diag() for a in m]) | torch.stack([torch.diagflat(a[0]) for a in m])
diag_embed: torch.diag_embed(u) | u.diag_embed(offset=1, dim1=-2, dim2=-1)
tril: m.tril() | torch.triu(m, diagonal=1) | m.clone().tril_(-1) | h.triu(1)
where: torch.where(o, h, 0.) | h.where(o, torch.zeros_like(h)) | torch.where(h > .1, h, torch.zeros_like(h)) | torch.where(h > .1, h, h.flip(3)) | torch.where(o, h, g) | torch.where(condition=o, input=g, other=h)
masked_fill: h.masked_fill(o, 0.) | h.clone().masked_fill_(mask=~o, value=0) | torch.masked_fill(h, h < .1, 0.) | h.masked_fill(o, -5.)
masked_scatter: m.masked_scatter(o, n[:, o]) | torch.masked_scatter(h, o, g[:, :, o]) | m.clone().masked_scatter_(mask=o, source=n[:, o] * 0)
index_add: torch.zeros_like(h).index_add(2, i, h[:, :, :4]) | g.index_add(2, i, h[:, :, :4]) | h.clone().index_add_(-1, i, g[..., :4], alpha=2)
index_copy: h.index_copy(2, i, g[:, :, :4]) | h.clone().index_copy_(dim=-1, index=i, source=torch.zeros_like(h)[..., :4]) | h.index_fill(2, i, 0.) | h.clone().index_fill_(-1, i, 0)
index_put: h.index_put((torch.arange(2)[:, None], i), g[:, :4]) | h.clone().index_put_((torch.arange(2),), g) | h.index_put((torch.arange(2),), g, accumulate=True)
scatter: torch.zeros_like(h).scatter(2, i[None, None, :, None].expand(2, 8, 4, 6), h[:, :, :4]) | h.scatter(2, i[None, None, :, None].expand(2, 8, 4, 6), g[:, :, :4]) | h.scatter(-1, i[None, None, None].expand(2, 8, 6, 4), 0.)
scatter_add: torch.zeros_like(h).scatter_add(2, i[None, None, :, None].expand(2, 8, 4, 6), h[:, :, :4]) | h.clone().scatter_add_(2, i[None, None, :, None].expand(2, 8, 4, 6), g[:, :, :4])
scatter_reduce: torch.zeros_like(h).scatter_reduce(2, i[None, None, :, None].expand(2, 8, 4, 6), h[:, :, :4], 'sum') | h.scatter_reduce(2, i[None, None, :, None].expand(2, 8, 4, 6), g[:, :, :4], 'amax') | h.scatter_reduce(2, i[None, None, :, None].expand(2, 8, 4, 6), g[:, :, :4], 'mean')
select_scatter: h.select_scatter(g[:, 0], 1, 2) | h.slice_scatter(g[:, :2], 1, 0, 2) | m.diagonal_scatter(n.diagonal(dim1=1, dim2=2), dim1=1, dim2=2)
setitem: k = h.clone(); k[:, :2] = 0; k | k = h.clone(); k[:, :2] = g[:, :2]; k | k = torch.zeros_like(h); k[:, ::2] = h[:, ::2]; k | k = torch.zeros(2, 8, 6, 6).double(); k[..., o] = h[..., o]; k
setitem again: k = h.clone(); k[:, :4] += g[:, 4:]; k | k = h.clone(); k[:, 0].zero_(); k | k = h.clone(); k[k < .1] = 0; k | k = h.clone(); k[:, :2].copy_(g[:, :2]); k
pad: F.pad(h, (1, 2)) | F.pad(input=h, pad=(1, 1, 1, 0), mode='constant', value=0) | F.pad(h, (-1, 1)) | torch.constant_pad_nd(h, (1, 1), 0.)
pad again: F.pad(v, (1, 1), 'reflect') | F.pad(h, (1, 1, 2, 0), mode='replicate') | F.pad(h, (1, 2, 0, 1), mode='circular') | F.pad(h, (1, 1, 1, 1), value=.5)
cat: torch.cat((h, g), 1) | torch.cat([h, g], dim=-1) | torch.concat((h, g), axis=2) | torch.stack((h, g), 1) | torch.stack((h, h), dim=-1) | torch.hstack((h, g)) | torch.dstack((h, g)) | torch.column_stack((u, w))
cat again: torch.cat((h, torch.zeros_like(h)), 1) | torch.cat((torch.zeros_like(h)[:, :, :, :2], h), -1) | torch.vstack((u[:1], u[1:])) | torch.cat((h, C.expand(2, -1, -1, -1)), 1) | torch.row_stack((u[:1], u[1:]))
atleast: torch.atleast_1d(h) | torch.atleast_2d(u) | torch.atleast_3d(m)
meshgrid: torch.stack([torch.block_diag(a, a) for a in m]) | torch.stack([torch.meshgrid(a[0], a[1], indexing='ij')[0] for a in m]) | torch.stack([torch.cartesian_prod(a[0], a[1]) for a in m]) | torch.stack([torch.combinations(a[0]) for a in m])
sort: h.sort().values | torch.sort(h, dim=1, descending=True)[0] | h.flatten(1).topk(5)[0] | torch.topk(h, k=2, dim=-3).values | torch.msort(m.transpose(0, 1)).transpose(0, 1) | h.kthvalue(2, 1).values
unique: h.movedim(1, 2).flatten(2).mode(-1).values
view_as_complex: torch.view_as_real(torch.view_as_complex(h.reshape(2, -1, 2).contiguous())) | torch.complex(h, g).real | torch.complex(h, g).abs() | torch.polar(p, h).imag | h.angle() | h.conj_physical()
detach: h + h.detach() | h.detach() * 0 + h | torch.Tensor.detach(h) * 0 + h
dropout: F.dropout(h, .5, False) | F.dropout(h, p=.5, training=False) | F.dropout2d(h, training=False) | F.alpha_dropout(h, training=False) | F.feature_alpha_dropout(h, training=False) | torch.dropout(h, .5, False) | F.dropout1d(v, training=False) | F.dropout3d(d, training=False)
other names: torch.feature_dropout(h, .5, False) | torch.native_dropout(h, .5, False)[0] | h.unsafe_split_with_sizes([2, 6], 1)[1] | h.to_dense() | h.to_sparse().to_dense() | torch.Tensor.__getitem__(h, (slice(None), 1)) | torch.ops.aten.permute(h, (0, 2, 3, 1)) | torch.view_as_real_copy(torch.complex(h, g)) | torch.stack([a.clone().fill_diagonal_(0.) for a in m])
copies: torch.view_copy(h, (2, -1)) | torch.permute_copy(h, (0, 2, 3, 1)) | torch.squeeze_copy(h[:, :1]) | torch.unfold_copy(h, 2, 2, 2) | torch.slice_copy(h, 1, 0, 4) | torch.select_copy(h, 1, 0) | torch.split_copy(h, 4, 1)[0] | torch.alias_copy(h)
''',
    'sums and products': '''
~add: h + g | torch.add(h, g) | h.add(other=g) | h.clone().add_(g) | torch.add(input=h, other=g, alpha=2) | h.add(g, alpha=-.5) | torch.add(h, g, out=None) | h.__add__(g) | sum([h, g])
~add again: k = h.clone(); k += g; k | torch.stack([h, g]).sum(0) | torch.stack((h, g), dim=-1).sum(-1) | sum((h, g, h.flip(1))) | torch.sum(torch.stack([h, g], 1), dim=1) | h + g.mean((2, 3), keepdim=True)
~add constants: h + 1 | 1 + h | h + C | c + h | h.add_(1.) | torch.add(h, 2) | h - C | h.sub(1.)
~sub: h - g | torch.sub(h, g) | torch.subtract(h, other=g, alpha=2) | h.clone().sub_(g) | torch.rsub(h, g) | 1 - h | C - h | torch.rsub(h, 1.) | k = h.clone(); k -= g; k | torch.rsub(input=h, other=g, alpha=2)
mul: h * c | c * h | torch.mul(h, c) | h.multiply(other=C) | h.clone().mul_(2.) | 2 * h | h * -1. | k = h.clone(); k *= c; k | torch.multiply(input=h, other=c)
mul of signal and gate: h * s | s * h | torch.mul(s, h) | h.clone().mul_(s) | h * s.mean((2, 3), keepdim=True) | u[:, :, None, None] * s | s * u[:, :, None, None] | h * F.hardsigmoid(g) | h * (s + 1) | h * h.sigmoid()
mul of two signals: h * g | torch.mul(h, g) | h * h | u[:, :, None, None] * g | g * u[:, :, None, None]
div: h / c | torch.div(h, 2) | h.true_divide(C) | h.clone().div_(2.) | torch.divide(input=h, other=c) | h / s | h / p.mean((2, 3), keepdim=True) | 1 / p | h / g | torch.div(h, 2., rounding_mode=None)
neg: -h | torch.neg(h) | h.negative() | h.clone().neg_()
addcmul: torch.addcmul(C, h, c) | torch.addcmul(h, C, c, value=2) | torch.addcmul(g, h, c) | torch.addcmul(h, g, s) | h.addcmul(tensor1=C, tensor2=c) | h.clone().addcmul_(C, C)
addcdiv: torch.addcdiv(h, C, c) | torch.addcdiv(C, h, c, value=.5) | h.addcdiv(tensor1=g, tensor2=c) | h.clone().addcdiv_(C, c)
lerp: torch.lerp(h, g, .3) | torch.lerp(h, g, s) | h.lerp(end=g, weight=.5) | h.clone().lerp_(g, .2) | torch.lerp(h, C, .5) | torch.lerp(C.expand_as(h), h, .5)
~true additions: torch.hypot(h, g) | torch.logaddexp(h, g) | torch.logaddexp2(h, g) | torch.atan2(h, g) | torch.fmod(h, g + 2) | torch.remainder(h, 2.) | torch.copysign(h, g) | torch.ldexp(h, torch.tensor(2)) | torch.float_power(p, 2)
complex products: torch.einsum('bchw,bchw->bc', h, g) | (h * g).sum(1) | torch.cross(h[:, :3], g[:, :3], dim=1) | torch.linalg.cross(h[:, :3], C[:3].expand(2, 3, 6, 6), dim=1) | torch.linalg.vecdot(h, g, dim=1) | torch.linalg.vecdot(h, C, dim=1)
matmul: u @ W.T | u.matmul(W.T) | torch.matmul(input=u, other=W.T) | h.permute(0, 2, 3, 1) @ W.T | h @ B | B @ h | m @ B | torch.matmul(B, m) | W @ h.flatten(2) | u @ W[0][:, None] | W @ u[:, :, None] | h.permute(0, 2, 3, 1) @ W[0] | torch.linalg.matmul(h, B) | u.__matmul__(W.T) | torch.Tensor.__rmatmul__(m, B)
matmul of two signals: m @ n | torch.bmm(m, n) | h @ g.mT | torch.matmul(h, g) | torch.baddbmm(m, m, n) | torch.einsum('bij,bjk->bik', m, n) | torch.einsum('bi,bj->bij', u, w)
mm: torch.mm(u, W.T) | u.mm(mat2=W.T) | torch.stack([torch.mm(B, a) for a in m]) | torch.stack([torch.mv(B, a[0]) for a in m]) | torch.stack([W.mv(a) for a in u]) | torch.stack([torch.dot(a, W[0]) for a in u])[:, None] | torch.stack([torch.inner(a, W) for a in u])
addmm: torch.addmm(b, u, W.T) | torch.addmm(input=b, mat1=u, mat2=W.T, beta=2, alpha=.5) | torch.addmm(w, u, W.T[:, [0, 1, 2, 3, 4, 0, 1, 2]]) | torch.stack([torch.addmv(b, W, a) for a in u]) | torch.stack([torch.addr(B, a[0], B[0]) for a in m]) | b.expand(2, 5).clone().addmm_(u, W.T)
bmm: torch.bmm(m, B.expand(2, 6, 6)) | B.expand(2, 6, 6).bmm(mat2=m) | torch.baddbmm(B.expand(2, 6, 6), m, B.expand(2, 6, 6)) | torch.baddbmm(m, n, B.expand(2, 6, 6)) | torch.stack([torch.addbmm(B, a[None], B[None]) for a in m])
einsum: torch.einsum('bchw,kc->bkhw', h, W) | torch.einsum('kc,bchw->bk', W, h) | torch.einsum('bchw->bhwc', h) | torch.einsum('bchw->bc', h) | torch.einsum('b c h w, k c -> b k h w', h, W) | torch.einsum('...hw,wk->...hk', h, B) | torch.einsum(h, [0, 1, 2, 3], W, [4, 1], [0, 4]) | torch.einsum('bii->bi', m)
einsum again: torch.einsum('bchw,kc,k->bhw', h, W, b) | torch.einsum('bchw,bchw->bchw', h, s) | torch.einsum('nctv,vw->nctw', h, B) | torch.einsum('bchw,c->bchw', h, c.flatten())
tensordot: torch.tensordot(h, W, dims=([1], [1])) | torch.tensordot(u, W.T, dims=1) | torch.tensordot(h, C, 3)[:, None] | torch.linalg.multi_dot([u, W.T, W]) | torch.chain_matmul(u, W.T)
outer: torch.stack([torch.outer(a, b) for a in u]) | torch.stack([torch.kron(a, B) for a in m]) | torch.stack([torch.vdot(a, W[0]) for a in u])[:, None] | torch.stack([torch.trace(a) for a in m])[:, None] | torch.stack([a.ger(b) for a in u])
linear: F.linear(u, W) | F.linear(u, W, b) | F.linear(input=u, weight=W, bias=b) | F.linear(h.permute(0, 2, 3, 1), W) | torch.nn.functional.linear(weight=W, input=u) | F.linear(u[:, None], W) | torch._C._nn.linear(u, W)
bilinear: F.bilinear(u, w, K1.transpose(1, 2)[:, :, :, None].expand(4, 3, 8, 8)[:, 0].contiguous()) | F.bilinear(u, W[0].expand(2, 8), W[:, :, None] * W[0])
''',
    'convolutions and poolings': '''
conv1d: F.conv1d(v, K1) | F.conv1d(input=v, weight=K1, bias=b[:4], stride=1, padding=1) | torch.conv1d(v, K1, None, 2) | F.conv1d(v, K1, padding='same') | F.conv1d(v, K1[:, :2].repeat(2, 1, 1), groups=4)
conv2d: F.conv2d(h, K) | F.conv2d(h, K, b[:4], padding=1) | F.conv2d(input=h, weight=K, stride=(2, 1), dilation=2) | torch.conv2d(h, K, padding='same') | F.conv2d(h, K[:, :4], groups=2) | F.conv2d(h, weight=K[:, :, :1, :1], stride=2)
conv3d: F.conv3d(d, K3) | F.conv3d(d, weight=K3, padding=1, stride=2) | torch.conv3d(d, K3, b[:4]) | torch.convolution(h, K, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
conv_transpose: F.conv_transpose2d(h, T) | F.conv_transpose2d(input=h, weight=T, bias=b[:4], stride=2, padding=1, output_padding=1) | F.conv_transpose1d(v, T1, stride=2) | F.conv_transpose3d(d, T3) | torch.conv_transpose2d(h, T[:, :2], groups=4) | F.conv_transpose2d(h, T, None, 3, 0, 0, 1, 2)
~deform_conv2d: ops.deform_conv2d(h, torch.zeros(2, 18, 6, 6).double() + .3, K, padding=1) | ops.deform_conv2d(h, g[:, :1].repeat(1, 18, 1, 1), K, padding=(1, 1)) | ops.deform_conv2d(input=h, offset=torch.zeros(2, 18, 6, 6).double(), weight=K, padding=1, mask=torch.ones(2, 9, 6, 6).double())
avg_pool: F.avg_pool2d(h, 2) | F.avg_pool2d(h, 3, 1, 1) | F.avg_pool2d(input=h, kernel_size=3, stride=2, padding=1, count_include_pad=False) | F.avg_pool2d(h, 4, 3, ceil_mode=True) | F.avg_pool1d(v, 3) | F.avg_pool3d(d, 2) | torch.avg_pool1d(v, kernel_size=2, stride=1) | F.avg_pool2d(h, 2, divisor_override=3)
adaptive_avg_pool: F.adaptive_avg_pool2d(h, 1) | F.adaptive_avg_pool2d(h, (4, None)) | F.adaptive_avg_pool1d(v, output_size=5) | F.adaptive_avg_pool3d(d, 2)
max_pool: F.max_pool2d(h, 2) | F.max_pool2d(h, 3, 2, 1) | F.max_pool2d(input=h, kernel_size=2, stride=1, dilation=2) | F.max_pool2d(h, 2, return_indices=True)[0] | F.max_pool1d(v, 3) | F.max_pool3d(d, 2, ceil_mode=True) | torch.max_pool2d(h, 2) | F.max_pool2d_with_indices(h, 2)[0]
adaptive_max_pool: F.adaptive_max_pool2d(h, 1) | F.adaptive_max_pool2d(h, (4, 3)) | F.adaptive_max_pool1d(v, output_size=5) | F.adaptive_max_pool3d(d, 2) | F.adaptive_max_pool2d(h, 2, True)[0]
with_indices: F.adaptive_max_pool2d_with_indices(h, 2)[0] | F.max_pool1d_with_indices(v, 3)[0] | torch.max_pool1d_with_indices(v, 3)[0] | F.max_pool3d_with_indices(d, 2)[0] | F.adaptive_max_pool1d_with_indices(v, 5)[0] | F.adaptive_max_pool3d_with_indices(d, 2)[0] | F.fractional_max_pool2d_with_indices(h, 2, output_size=3, _random_samples=torch.full((2, 8, 2), .5).double())[0] | torch.adaptive_max_pool1d(v, 4)[0]
other poolings: F.lp_pool2d(h, 2, 2) | F.lp_pool1d(v, 2., 3) | F.lp_pool3d(d, 2, 2) | F.fractional_max_pool2d(h, 2, output_size=3, _random_samples=torch.full((2, 8, 2), .5).double()) | F.fractional_max_pool3d(d, 2, output_size=(2, 3, 3), _random_samples=torch.full((2, 2, 3), .5).double())
max_unpool: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2) | F.max_unpool1d(*F.max_pool1d(v, 3, return_indices=True), kernel_size=3) | F.max_unpool3d(*F.max_pool3d(d, 2, return_indices=True), 2)
mean: h.mean((2, 3)) | torch.mean(h, dim=(-1, -2), keepdim=True) | h.mean(1) | torch.mean(h, -3) | h.mean(dim=(1, 2, 3)) | h.nanmean((2, 3)) | torch.nanmean(h, dim=-1) | h.flatten(2).mean(-1)
sum: h.sum((2, 3)) | torch.sum(h, dim=-1) | h.sum(1, keepdim=True) | h.sum(axis=1) | torch.nansum(h, dim=1) | h.nansum((2, 3)) | h.sum_to_size(2, 8, 1, 1) | torch.stack([a.sum() for a in h])[:, None] | torch.stack([a.mean() for a in h])[:, None]
cumsum: h.cumsum(3) | torch.cumsum(h, dim=1) | h.clone().cumsum_(-1) | torch.cumsum(input=v, dim=-1)
~diff: h.diff() | torch.diff(h, dim=1) | torch.trapezoid(h) | torch.trapz(h, dx=.5) | torch.cumulative_trapezoid(h) | torch.gradient(h, dim=-1)[0]
interpolate: F.interpolate(h, scale_factor=2) | F.interpolate(h, (4, 9), mode='bilinear') | F.interpolate(input=h, size=(11, 11), mode='bilinear', align_corners=True) | F.interpolate(h, 3, mode='area') | F.interpolate(h, scale_factor=2, mode='nearest-exact') | F.interpolate(v, 20, mode='linear') | F.interpolate(d, scale_factor=2, mode='trilinear')
upsample: F.upsample(h, scale_factor=2) | F.upsample_nearest(h, scale_factor=2) | F.upsample_bilinear(h, scale_factor=2) | torch._C._nn.upsample_nearest2d(h, (12, 12))
bicubic: F.interpolate(h, scale_factor=2, mode='bicubic') | F.interpolate(h, (3, 3), mode='bicubic', antialias=True) | F.interpolate(h, size=(9, 9), mode='bicubic', align_corners=True) | F.interpolate(h, (3, 3), mode='bilinear', antialias=True)
grid_sample: F.grid_sample(h, F.affine_grid(torch.eye(2, 3).expand(2, 2, 3).double() * .8, (2, 8, 5, 5), align_corners=False), align_corners=False) | F.grid_sample(h, n[:, :, :2].tanh()[:, :, None], align_corners=False) | F.grid_sample(input=h, grid=B[None, :, :, None].expand(2, 6, 6, 2).tanh(), mode='nearest', padding_mode='border', align_corners=True)
grid_sampler: torch.grid_sampler(h, B[None, :, :, None].expand(2, 6, 6, 2).tanh(), 0, 0, False) | torch.grid_sampler_2d(h, B[None, :, :, None].expand(2, 6, 6, 2).tanh(), 0, 1, True)
roi_align: ops.roi_align(h, boxes, 3) | ops.roi_align(input=h, boxes=boxes, output_size=(2, 2), sampling_ratio=2, aligned=True) | ops.roi_pool(h, boxes, 2) | ops.roi_pool(input=h, boxes=boxes, output_size=(3, 3)) | ops.ps_roi_align(h, boxes, 2) | ops.ps_roi_pool(h, boxes, 2)
stochastic_depth: ops.stochastic_depth(h, .5, 'row', training=False) | ops.drop_block2d(h, .5, 3, training=False) | ops.drop_block3d(d, .5, 3, training=False)
max: h.amax((2, 3)) | torch.amax(h, dim=-1, keepdim=True) | h.max(1)[0] | torch.max(h, dim=-1).values | h.max(dim=1, keepdim=True).values | torch.stack([a.max() for a in h])[:, None] | h.flatten(1).max(-1).values[:, None]
min: h.amin((2, 3)) | torch.amin(h, dim=-1) | h.min(1)[0] | torch.min(input=h, dim=-1).values | h.median(1).values | h.nanmedian(-1).values | h.aminmax(dim=1).max | torch.stack([a.min() for a in h])[:, None]
maximum: torch.maximum(h, g) | torch.minimum(h, g) | torch.max(h, g) | torch.min(input=h, other=g) | torch.fmax(h, g) | h.fmin(g) | torch.maximum(h, C) | torch.max(h, other=C) | torch.max(torch.stack([h, g]), 0)[0] | torch.stack([h, g]).amax(0)
cummax: h.cummax(1).values | torch.cummin(h, dim=-1).values | h.cummax(-1)[0]
softmax pooling: (h * h.mean(1, keepdim=True).flatten(2).softmax(2).reshape(2, 1, 6, 6)).sum((2, 3)) | torch.bmm(h.flatten(2), g.flatten(2).mean(1)[:, :, None].softmax(1)).squeeze(2) | torch.einsum('bcn,bn->bc', h.flatten(2), g.mean(1).flatten(1).softmax(1)) | h.flatten(2) @ g.mean(1).flatten(1).softmax(1)[:, :, None] | (h * g.mean(1, keepdim=True).sigmoid()).sum((2, 3))
quantiles: h.quantile(.5, 1) | torch.quantile(h, q=.3, dim=-1) | h.nanquantile(.5, dim=1)
''',
    'element by element': '''
relu: F.relu(h) | torch.relu(h) | h.relu() | h.clone().relu_() | F.relu(h.clone(), inplace=True) | F.relu_(h.clone()) | F.relu6(h) | F.relu(input=h)
activations: F.leaky_relu(h, .1) | F.leaky_relu(input=h, negative_slope=.2) | F.elu(h) | F.selu(h) | F.celu(h) | F.gelu(h) | F.gelu(h, approximate='tanh') | F.silu(h) | F.mish(h) | F.prelu(h, c.flatten()) | F.rrelu(h) | torch.prelu(h, c.flatten()[:1])
more activations: F.hardtanh(h) | F.hardswish(h) | F.hardsigmoid(h) | F.sigmoid(h) | torch.sigmoid(h) | h.tanh() | F.softplus(h) | F.softsign(h) | F.logsigmoid(h) | F.tanhshrink(h) | F.hardshrink(h) | F.softshrink(h) | F.threshold(h, .1, 0.)
in place: F.elu_(h.clone()) | F.selu_(h.clone()) | F.celu_(h.clone()) | F.leaky_relu_(h.clone()) | F.hardtanh_(h.clone()) | F.threshold_(h.clone(), .1, 0) | F.rrelu_(h.clone()) | h.clone().sigmoid_() | h.clone().tanh_() | F.silu(h.clone(), inplace=True)
clamp: h.clamp(0, 1) | torch.clamp(h, min=0) | h.clip(max=.5) | h.clone().clamp_(min=-1) | h.clamp_min(0.) | torch.clamp_max(h, 1.) | h.clamp(C, C + 1) | h.clamp(min=g) | h.clone().clip_(0, 6)
abs: h.abs() | torch.abs(h) | h.absolute() | h.clone().abs_() | abs(h)
pow: h ** 2 | h.pow(3) | torch.pow(p, .5) | torch.pow(input=p, exponent=1 / 3) | p ** c | h.square() | torch.square(h) | h.clone().square_() | h.clone().pow_(2) | 2 ** h | torch.pow(2., h) | p ** g
sqrt: p.sqrt() | torch.rsqrt(p) | p.clone().sqrt_() | p.reciprocal() | p.clone().rsqrt_()
exp: h.exp() | torch.exp2(h) | h.expm1() | h.clone().exp_() | torch.special.expm1(h) | torch.special.exp2(h)
log: p.log() | torch.log2(p) | p.log10() | torch.log1p(p) | p.clone().log_() | torch.special.log1p(p) | torch.special.xlogy(c, p) | torch.special.xlog1py(2., p) | torch.xlogy(h, p) | torch.special.entr(p)
trigonometry: h.sin() | h.cos() | torch.tan(q) | q.asin() | q.acos() | h.atan() | h.sinh() | h.cosh() | h.asinh() | t.acosh() | q.atanh() | torch.sinc(h) | h.deg2rad() | torch.rad2deg(h) | h.clone().sin_() | torch.arctan(h)
erf: h.erf() | h.erfc() | q.erfinv() | torch.special.erfcx(h) | torch.special.ndtr(h) | torch.special.log_ndtr(h) | p.lgamma() | p.digamma() | torch.special.psi(p) | torch.special.gammaln(p) | torch.special.expit(h) | (q * .4 + .5).logit() | torch.special.i0(h) | torch.special.i0e(h) | torch.special.i1(h) | torch.special.ndtri(q * .4 + .5)
other special: torch.polygamma(1, p) | torch.mvlgamma(t, 2) | torch.special.multigammaln(t, 2) | torch.special.gammainc(c.abs(), p) | torch.igamma(c.abs(), p) | torch.special.i1e(h)
rounding: h.round() | h.floor() | h.ceil() | h.trunc() | h.frac() | torch.fix(h) | h.sign() | h.sgn() | h.round(decimals=1)
straight through: h + (h.round() - h).detach() | torch.fake_quantize_per_tensor_affine(h, .1, 0, -128, 127)
''',
    'normalizations and others': '''
batch_norm: F.batch_norm(h, mu, var) | F.batch_norm(h, running_mean=mu, running_var=var, weight=c.flatten(), bias=c.flatten()) | torch.batch_norm(h, c.flatten(), c.flatten(), mu, var, False, .1, 1e-5, False)
batch_norm without statistics: F.batch_norm(h, None, None, training=True) | F.batch_norm(h, mu.clone(), var.clone(), training=True) | F.batch_norm(h, None, None, c.flatten(), c.flatten(), True)
layer_norm: F.layer_norm(h, (8, 6, 6)) | F.layer_norm(u, (8,), W[0], W[1]) | F.group_norm(h, 4) | F.group_norm(h, num_groups=2, weight=c.flatten(), bias=c.flatten()) | F.instance_norm(h) | F.rms_norm(h, (6,)) | F.local_response_norm(h, 3) | torch.layer_norm(h, (6, 6))
normalize: F.normalize(u) | F.normalize(input=h, p=1., dim=-1) | h / h.norm(dim=1, keepdim=True) | h / h.norm(p=2, dim=1, keepdim=True).clamp(min=1e-6) | u / u.abs().sum(1, keepdim=True) | (h - h.mean((2, 3), keepdim=True)) / h.std((2, 3), keepdim=True) | torch.stack([a.renorm(2, 0, 1.) for a in h])
norms: h.norm(dim=1) | torch.linalg.norm(u, dim=1)[:, None] | torch.linalg.vector_norm(h, dim=(2, 3)) | torch.norm(h, 1, dim=1) | h.std((2, 3)) | torch.std(h, dim=-1) | h.var(1) | torch.var(h, dim=(2, 3), correction=0) | torch.var_mean(h, dim=1)[1] | torch.std_mean(h, (2, 3))[0] | torch.linalg.matrix_norm(m)[:, None]
other norms: torch.norm_except_dim(u, 2, 0) | torch.linalg.cond(m)[:, None] | torch.stack([torch.nuclear_norm(a) for a in m])[:, None] | torch.stack([torch.frobenius_norm(a, (0, 1)) for a in m])[:, None]
logsumexp: h.logsumexp(1) | torch.logsumexp(h, dim=(2, 3)) | h.logcumsumexp(1) | h.prod(1) | torch.prod(h, dim=-1) | h.cumprod(1) | torch.special.logsumexp(h, 1)
softmax: h.softmax(1) | F.softmax(h, dim=-1) | h.log_softmax(1) | F.softmin(h, 1) | torch.special.softmax(h, 1) | torch.softmax(u, dim=1) | F.log_softmax(u, 1)
glu: F.glu(h, 1) | F.glu(h) | h[:, :4] * h[:, 4:].sigmoid() | F.silu(h[:, :4]) * h[:, 4:]
attention: F.scaled_dot_product_attention(m, n, m) | (m @ n.mT).softmax(-1) @ m | F.scaled_dot_product_attention(B.expand(2, 6, 6), B.expand(2, 6, 6), m)
distances: F.cosine_similarity(u, w)[:, None] | F.cosine_similarity(h, C, dim=1) | F.pairwise_distance(u, w)[:, None] | torch.cdist(u[:, None], W) | torch.cdist(m, n) | torch.stack([F.pdist(a) for a in m])
fft: torch.fft.fft(h).real | torch.fft.rfft2(h).abs() | torch.fft.irfft(torch.fft.rfft(h)) | torch.fft.fftshift(h, dim=-1) | torch.stft(v.flatten(1), 8, window=torch.ones(8).double(), return_complex=True).abs()
linear algebra: torch.linalg.inv(m + 9 * torch.eye(6).double()) | torch.linalg.det(m)[:, None] | torch.linalg.solve(B, m) | torch.linalg.svdvals(m) | torch.linalg.eigvalsh(m) | torch.matrix_exp(m) | torch.linalg.qr(m)[0] | torch.linalg.matrix_power(m, 2) | torch.linalg.cholesky(m @ m.mT + torch.eye(6).double()) | m.pinverse()
statistics: torch.stack([torch.cov(a) for a in m]) | torch.stack([a.corrcoef() for a in m]) | torch.stack([torch.bucketize(a, b).double() for a in u]) * u
losses: F.mse_loss(h, g, reduction='none') | F.l1_loss(h, C.expand_as(h), reduction='none') | F.smooth_l1_loss(h, g, reduction='none') | F.huber_loss(h, g, reduction='none') | F.binary_cross_entropy_with_logits(h, C.sigmoid().expand_as(h), reduction='none') | F.cross_entropy(u, torch.tensor([1, 2]), reduction='none')[:, None] | F.kl_div(h, s.detach(), reduction='none') | F.nll_loss(u, torch.tensor([1, 2]), reduction='none')[:, None]
~boxes: ops.box_convert(u[:, :4], 'cxcywh', 'xyxy') | ops.box_area(u[:, :4])[:, None] | ops.clip_boxes_to_image(u[:, :4], (5, 5)) | ops.box_iou(u[:, :4] + boxes[:, 1:], boxes[:1, 1:]) | ops.complete_box_iou_loss(u[:, :4] + boxes[:, 1:], boxes[:, 1:])[:, None]
more losses: F.soft_margin_loss(h, C.detach().sign().expand_as(h), reduction='none') | F.hinge_embedding_loss(h, C.sign().expand_as(h), reduction='none') | F.triplet_margin_loss(u, w, -u, reduction='none')[:, None] | F.poisson_nll_loss(h, C.abs().expand_as(h), reduction='none') | F.gaussian_nll_loss(h, g, p, reduction='none') | F.cosine_embedding_loss(u, w, torch.ones(2), reduction='none')[:, None] | ops.sigmoid_focal_loss(h, C.sigmoid().expand_as(h))
custom functions: torch.utils.checkpoint.checkpoint(torch.relu, h, use_reentrant=False) | torch.func.vmap(torch.relu)(h) | torch.func.vmap(lambda a: a * 2 + a.flip(0))(h) | torch.utils.checkpoint.checkpoint(F.conv2d, h, K, use_reentrant=False)
''',
}

# Layers of torch.nn and torchvision.ops by what they are given
LAYERS = {
    'h': '''
nn.Conv2d(8, 4, 3) | nn.Conv2d(8, 8, 3, 2, 1, groups=4) | nn.Conv2d(8, 4, 1, stride=2) | nn.Conv2d(8, 4, 3, padding='same', padding_mode='reflect') | nn.Conv2d(8, 4, 3, padding=1, padding_mode='circular') | nn.Conv2d(8, 4, 2, dilation=2, bias=False)
nn.ConvTranspose2d(8, 4, 3) | nn.ConvTranspose2d(8, 4, 3, 2, 1, 1) | nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2) | nn.LazyConv2d(4, 3) | nn.LazyConvTranspose2d(4, 3)
nn.BatchNorm2d(8) | nn.BatchNorm2d(8, affine=False) | nn.SyncBatchNorm(8) | nn.LazyBatchNorm2d() | ops.FrozenBatchNorm2d(8)
nn.BatchNorm2d(8, track_running_stats=False)
nn.GroupNorm(4, 8) | nn.InstanceNorm2d(8) | nn.InstanceNorm2d(8, affine=True, track_running_stats=True) | nn.LazyInstanceNorm2d() | nn.LayerNorm((6, 6)) | nn.LayerNorm(6, elementwise_affine=False) | nn.RMSNorm(6) | nn.LocalResponseNorm(3) | nn.CrossMapLRN2d(3)
nn.AvgPool2d(2) | nn.AvgPool2d(3, 1, 1, count_include_pad=False) | nn.AvgPool2d(4, 3, ceil_mode=True) | nn.AdaptiveAvgPool2d(1) | nn.AdaptiveAvgPool2d((4, None)) | nn.MaxPool2d(2) | nn.MaxPool2d(3, 2, 1) | nn.MaxPool2d(2, 1, dilation=2, ceil_mode=True) | nn.AdaptiveMaxPool2d((2, 4))
nn.LPPool2d(2, 2) | nn.FractionalMaxPool2d(2, output_size=3, _random_samples=torch.full((2, 8, 2), .5).double())
nn.ZeroPad2d(1) | nn.ZeroPad2d((-1, 1, 0, 2)) | nn.ConstantPad2d(1, .5) | nn.ReflectionPad2d(1) | nn.ReplicationPad2d((1, 0, 1, 2)) | nn.CircularPad2d(1)
nn.Identity() | nn.Flatten() | nn.Flatten(2) | nn.Unflatten(1, (2, 4)) | nn.PixelShuffle(2) | nn.PixelUnshuffle(2) | nn.ChannelShuffle(2) | nn.Unfold(2, stride=2) | ops.Permute([0, 2, 3, 1])
nn.Upsample(scale_factor=2) | nn.Upsample((9, 9), mode='bilinear') | nn.UpsamplingNearest2d(scale_factor=2) | nn.UpsamplingBilinear2d(scale_factor=2)
nn.Upsample(scale_factor=2, mode='bicubic')
nn.Dropout() | nn.Dropout2d() | nn.AlphaDropout() | nn.FeatureAlphaDropout() | ops.StochasticDepth(.5, 'row') | ops.DropBlock2d(.5, 3)
nn.ReLU() | nn.ReLU(True) | nn.ReLU6() | nn.LeakyReLU(.1, inplace=True) | nn.PReLU(8) | nn.RReLU() | nn.ELU() | nn.CELU() | nn.SELU() | nn.GELU() | nn.SiLU(True) | nn.Mish() | nn.Hardtanh() | nn.Hardswish() | nn.Hardsigmoid() | nn.Sigmoid() | nn.Tanh() | nn.Softplus() | nn.Softsign() | nn.LogSigmoid() | nn.Tanhshrink() | nn.Hardshrink() | nn.Softshrink() | nn.Threshold(.1, 0.)
nn.Softmax(1) | nn.Softmax2d() | nn.LogSoftmax(1) | nn.Softmin(1)
nn.GLU(1)
nn.Linear(6, 4) | nn.Sequential(nn.Flatten(), nn.Linear(288, 7, bias=False)) | nn.LazyLinear(4)
nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)) | nn.ModuleList([nn.Conv2d(8, 8, 1)])[0] | ops.Conv2dNormActivation(8, 8) | ops.SqueezeExcitation(8, 4) | ops.MLP(6, [8, 4])
nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 3)) | nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 4, 3)) | nn.utils.spectral_norm(nn.Conv2d(8, 4, 3)) | nn.utils.weight_norm(nn.Conv2d(8, 4, 3)) | nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)) | prune.l1_unstructured(nn.Conv2d(8, 4, 3), 'weight', .5)
torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(8, 4, 3), nn.ReLU()) | torch.ao.quantization.QuantStub()
nn.DataParallel(nn.Conv2d(8, 4, 3))
''',
    'v': '''
nn.Conv1d(8, 4, 3) | nn.Conv1d(8, 4, 3, 2, padding_mode='replicate', padding=1) | nn.ConvTranspose1d(8, 4, 3, stride=2) | nn.LazyConv1d(4, 3) | nn.LazyConvTranspose1d(4, 3) | nn.BatchNorm1d(8) | nn.LazyBatchNorm1d() | nn.InstanceNorm1d(8) | nn.GroupNorm(2, 8) | nn.LazyInstanceNorm1d()
nn.AvgPool1d(3) | nn.AdaptiveAvgPool1d(5) | nn.MaxPool1d(3, 1, 1) | nn.AdaptiveMaxPool1d(4) | nn.LPPool1d(2, 3)
nn.ZeroPad1d(1) | nn.ConstantPad1d(2, 0.) | nn.ReflectionPad1d(2) | nn.ReplicationPad1d(1) | nn.CircularPad1d(1) | nn.Dropout1d() | nn.Upsample(scale_factor=2, mode='linear')
nn.Linear(12, 5) | nn.Fold((4, 5), (2, 2))
nn.LSTM(12, 4, batch_first=True) | nn.GRU(12, 4, batch_first=True) | nn.RNN(12, 4, batch_first=True)
nn.TransformerEncoderLayer(12, 2, 8, batch_first=True) | nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 8, batch_first=True), 1)
nn.MultiheadAttention(12, 2, batch_first=True) -> layer(v, v, v) | nn.MultiheadAttention(12, 2, batch_first=True) -> layer(v, v, v, need_weights=False)
nn.Transformer(12, 2, 1, 1, 8, batch_first=True) -> layer(v, v) | nn.TransformerDecoderLayer(12, 2, 8, batch_first=True) -> layer(v, v) | nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 2, 8, batch_first=True), 1) -> layer(v, v)
''',
    'd': '''
nn.Conv3d(2, 4, 3) | nn.Conv3d(2, 4, 3, 2, 1) | nn.ConvTranspose3d(2, 4, 2, 2) | nn.LazyConv3d(4, 3) | nn.LazyConvTranspose3d(4, 3) | nn.BatchNorm3d(2) | nn.LazyBatchNorm3d() | nn.InstanceNorm3d(2) | nn.LazyInstanceNorm3d() | ops.Conv3dNormActivation(2, 4)
nn.AvgPool3d(2) | nn.AdaptiveAvgPool3d(2) | nn.MaxPool3d(2) | nn.AdaptiveMaxPool3d((1, 2, 2)) | nn.LPPool3d(2, 2) | nn.FractionalMaxPool3d(2, output_size=(2, 3, 3), _random_samples=torch.full((2, 2, 3), .5).double())
nn.ZeroPad3d(1) | nn.ConstantPad3d(1, 0.) | nn.ReflectionPad3d(1) | nn.ReplicationPad3d(1) | nn.CircularPad3d(1) | nn.Dropout3d() | nn.Upsample(scale_factor=2, mode='trilinear') | ops.DropBlock3d(.5, 3)
''',
    'u': '''
nn.Linear(8, 5) | nn.Linear(8, 5, bias=False) | nn.BatchNorm1d(8) | nn.LayerNorm(8) | nn.RMSNorm(8) | nn.LazyLinear(3) | nn.modules.linear.NonDynamicallyQuantizableLinear(8, 5)
nn.LSTMCell(8, 4) | nn.GRUCell(8, 4) | nn.RNNCell(8, 4)
nn.Bilinear(8, 8, 4) -> layer(u, w) | nn.CosineSimilarity() -> layer(u, w)[:, None] | nn.PairwiseDistance() -> layer(u, w)[:, None]
nn.MaxUnpool1d(3) -> layer(*F.max_pool1d(v, 3, return_indices=True)) | nn.MaxUnpool2d(2) -> layer(*F.max_pool2d(h, 2, return_indices=True)) | nn.MaxUnpool3d(2) -> layer(*F.max_pool3d(d, 2, return_indices=True))
ops.DeformConv2d(8, 4, 3, padding=1) -> layer(h, torch.full((2, 18, 6, 6), .3).double()) | ops.RoIAlign(3, 1., 2) -> layer(h, boxes) | ops.RoIPool(3, 1.) -> layer(h, boxes) | ops.PSRoIAlign(2, 1., 2) -> layer(h, boxes) | ops.PSRoIPool(2, 1.) -> layer(h, boxes)
ops.FeaturePyramidNetwork([8, 8], 4) -> layer({'0': h, '1': F.max_pool2d(g, 2)})['0'] | ops.MultiScaleRoIAlign(['0'], 3, 2) -> layer({'0': h}, [boxes[:1, 1:], boxes[1:, 1:]], [(6, 6), (6, 6)])
nn.MSELoss(reduction='none') -> layer(h, g) | nn.L1Loss(reduction='none') -> layer(h, g) | nn.SmoothL1Loss(reduction='none') -> layer(h, g) | nn.HuberLoss(reduction='none') -> layer(h, g) | nn.KLDivLoss(reduction='none') -> layer(h, s.detach()) | nn.CrossEntropyLoss(reduction='none') -> layer(u, torch.tensor([1, 2]))[:, None] | nn.BCELoss(reduction='none') -> layer(h.sigmoid(), s.detach()) | nn.BCEWithLogitsLoss(reduction='none') -> layer(h, s.detach())
nn.NLLLoss(reduction='none') -> layer(u, torch.tensor([1, 2]))[:, None] | nn.PoissonNLLLoss(reduction='none') -> layer(h, C.detach().abs().expand_as(h)) | nn.GaussianNLLLoss(reduction='none') -> layer(h, g, p) | nn.HingeEmbeddingLoss(reduction='none') -> layer(h, C.detach().sign().expand_as(h)) | nn.SoftMarginLoss(reduction='none') -> layer(h, C.detach().sign().expand_as(h)) | nn.TripletMarginLoss(reduction='none') -> layer(u, w, -u)[:, None] | nn.CosineEmbeddingLoss(reduction='none') -> layer(u, w, torch.ones(2))[:, None] | nn.MultiMarginLoss(reduction='none') -> layer(u, torch.tensor([1, 2]))[:, None] | nn.MarginRankingLoss(reduction='none') -> layer(u, w, torch.ones(2, 1)) | nn.AdaptiveLogSoftmaxWithLoss(8, 5, [2]) -> layer.log_prob(u)
nn.ParameterList([torch.ones(8).double()]) -> u * layer[0] | nn.ModuleDict({'a': nn.Linear(8, 5)}) -> layer['a'](u) | nn.ParameterDict({'a': torch.ones(8).double()}) -> u * layer['a']
''',
}

# Spellings of one function, whose maps must all be the same. Layers are in brackets.
TWINS = '''
u @ W.T | F.linear(u, W) | torch.mm(u, W.T) | torch.einsum('bc,kc->bk', u, W) | torch.tensordot(u, W, dims=([1], [1])) | (W @ u[:, :, None])[:, :, 0] | torch.matmul(u, W.t()) | F.conv1d(u[:, :, None], W[:, :, None])[:, :, 0] | torch.inner(u, W)
u @ W.T + b | F.linear(u, W, b) | torch.addmm(b, u, W.T) | b + u.matmul(W.T) | torch.addmm(b, mat1=u, mat2=W.T) | torch.baddbmm(b.expand(2, 1, 5), u[:, None], W.T.expand(2, 8, 5))[:, 0]
F.conv2d(h, K, b[:4], padding=1) | [conv](h) | [wrapped](h) | [parametrized](h) | [weightnorm](h) | [subclass](h) | [parametrizedsubclass](h) | [weightnormsubclass](h) | [oldweightnorm](h) | [oldweightnormsubclass](h) | torch.func.functional_call([conv], dict([conv].named_parameters()), (h,)) | torch.utils.checkpoint.checkpoint([conv], h, use_reentrant=False) | F.conv2d(F.pad(h, (1, 1, 1, 1)), K, b[:4]) | torch.conv2d(h, K, b[:4], 1, 1) | torch.convolution(h, K, b[:4], (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
F.conv2d(h, K[:, :, 1:2, 1:2]) | torch.einsum('bchw,kc->bkhw', h, K[:, :, 1, 1]) | (h.permute(0, 2, 3, 1) @ K[:, :, 1, 1].T).permute(0, 3, 1, 2) | F.linear(h.permute(0, 2, 3, 1), K[:, :, 1, 1]).permute(0, 3, 1, 2) | torch.tensordot(h, K[:, :, 1, 1], dims=([1], [1])).permute(0, 3, 1, 2) | (K[:, :, 1, 1] @ h.flatten(2)).unflatten(2, (6, 6))
F.linear(u, W, b) | [linear](u) | [parametrizedlinear](u) | [wrappedlinear](u)  # not block
[linear](u) | [parametrizedlinear](u) | [wrappedlinear](u)
[alone](h) | torch.func.functional_call([conv], dict([changed].named_parameters()), (h,)) | torch.func.functional_call([wrapped], {'inner.0.' + key: value for key, value in [changed].named_parameters()}, (h,)) | torch.func.functional_call([subclass], dict([changed].named_parameters()), (h,))
[normchanged](h) | torch.func.functional_call([normconv], [normchanged].state_dict(), (h,))
F.conv_transpose2d(h, T, stride=2) | [transposed](h) | torch.conv_transpose2d(h, T, None, 2) | [wrappedtransposed](h)
F.conv_transpose2d(h, T[:, :, 1:2, 1:2]) | F.conv2d(h, T[:, :, 1:2, 1:2].transpose(0, 1)) | torch.einsum('bchw,ck->bkhw', h, T[:, :, 1, 1])
[normed](h) | F.relu([norm]([conv](h))) | F.relu(F.batch_norm([conv](h), [norm].running_mean, [norm].running_var, [norm].weight, [norm].bias)) | F.relu([frozen]([conv](h)))
F.relu([norm]([conv](h))) | F.relu([frozen]([conv](h))) | F.relu(F.batch_norm([conv](h), [norm].running_mean, [norm].running_var, [norm].weight, [norm].bias)) | F.relu(F.batch_norm(F.conv2d(h, K, b[:4], padding=1), [norm].running_mean, [norm].running_var, [norm].weight, bias=[norm].bias)) | F.relu([syncnorm]([conv](h))) | F.relu([subclassnorm]([conv](h)))
F.relu([norm]([conv](h))) | F.relu([folded](h))  # only merge, relative, block
F.relu([norm]([conv](h))) | F.relu([conv](h) * [frozen].factor + [frozen].shift)  # only block
F.max_pool2d(h, 3, 2, 1) | [maxpool](h) | [subclassmaxpool](h) | torch.max_pool2d(h, 3, 2, 1) | F.max_pool2d(h, 3, 2, 1, return_indices=True)[0] | F.max_pool2d_with_indices(h, 3, 2, 1)[0] | [maxpoolindices](h)[0] | torch.nn.functional.max_pool2d(input=h, kernel_size=3, stride=2, padding=1)
F.avg_pool2d(h, 2) | [avgpool](h) | h.unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5)) | F.adaptive_avg_pool2d(h, 3) | F.interpolate(h, (3, 3), mode='area') | h.reshape(2, 8, 3, 2, 3, 2).mean((3, 5))
h.mean((2, 3)) | F.adaptive_avg_pool2d(h, 1).flatten(1) | [globalpool](h).flatten(1) | F.avg_pool2d(h, 6).flatten(1) | h.flatten(2).mean(2) | torch.mean(h, dim=(-2, -1)) | h.sum((2, 3)) / 36 | h.reshape(2, 8, -1).mean(-1) | torch.einsum('bchw->bc', h) / 36 | h.nanmean((2, 3))
h.amax((2, 3)) | F.adaptive_max_pool2d(h, 1).flatten(1) | h.flatten(2).max(2)[0] | F.max_pool2d(h, 6).flatten(1) | h.flatten(2).max(-1).values | torch.amax(h, dim=(-1, -2))
-(-h).amax((2, 3)) | h.amin((2, 3)) | h.flatten(2).min(2)[0] | torch.min(h.flatten(2), dim=-1).values
h + g | torch.add(h, g) | h.add(g) | h.clone().add_(g) | torch.add(h, g, alpha=1) | k = h.clone(); k += g; k | torch.stack([h, g]).sum(0) | torch.stack((h, g), 1).sum(1) | sum([h, g]) | h - (-g) | torch.stack([h, g], -1).sum(-1) | torch.sub(h, g, alpha=-1)
h + .5 * g | torch.add(h, g, alpha=.5) | h.add(.5 * g) | h + g / 2 | h - g * -.5
h - g | torch.sub(h, g) | h.subtract(g) | h + -g | torch.rsub(g, h) | torch.add(h, g, alpha=-1)
h * c | c * h | torch.mul(h, c) | h.clone().mul_(c) | h / (1 / c) | torch.einsum('bchw,c->bchw', h, c.flatten()) | torch.addcmul(torch.zeros_like(h), h, c)
h * s | s * h | h.mul(s) | h.clone().mul_(s)
h * s | torch.mul(other=s, input=h) | h * s.detach()  # not block
F.glu(h, 1) | h[:, :4] * h[:, 4:].sigmoid() | [glu](h) | h.chunk(2, 1)[0] * torch.sigmoid(h.chunk(2, 1)[1])
F.silu(h) | [silu](h) | [siluinplace](h.clone()) | F.silu(h.clone(), inplace=True)
F.relu(h) | h.relu() | torch.relu_(h.clone()) | h.clamp(min=0) | h.clamp_min(0) | [relu](h) | F.threshold(h, 0., 0.) | torch.maximum(h, torch.zeros_like(h)) | F.leaky_relu(h, 0.)  # only block
F.relu(h) | h.relu() | torch.relu_(h.clone()) | h.clamp(min=0) | h.clamp_min(0) | [relu](h) | F.threshold(h, 0., 0.) | F.leaky_relu(h, 0.) | torch.utils.checkpoint.checkpoint([relu], h, use_reentrant=False)
h.abs() | torch.abs(h) | abs(h) | h.clone().abs_() | h.absolute()
h ** 2 | h.square() | h.pow(2) | torch.pow(h, 2) | h.clone().pow_(2)
torch.lerp(h, g, .3) | h + .3 * (g - h)  # only block
torch.lerp(h, g, .3) | h.lerp(g, .3) | .7 * h + .3 * g
torch.cat((h, g), 1) | torch.concat([h, g], dim=1) | torch.stack((h, g), 1).flatten(1, 2) | torch.hstack((h, g)) | torch.cat((h, g), axis=-3) | k = torch.zeros(2, 16, 6, 6).double(); k[:, :8] = h; k[:, 8:] = g; k
F.pad(h, (1, 1, 1, 1)) | [zeropad](h) | [constantpad](h) | torch.constant_pad_nd(h, (1, 1, 1, 1)) | F.pad(input=h, pad=[1, 1, 1, 1], mode='constant', value=0.) | k = torch.zeros(2, 8, 8, 8).double(); k[:, :, 1:-1, 1:-1] = h; k  # only block, relative
h.where(o, torch.zeros_like(h)) | h.masked_fill(~o, 0.) | torch.where(o, h, 0.) | k = h.clone(); k[:, :, ~o] = 0; k | h.clone().masked_fill_(~o, 0)
torch.where(o, h, g) | g.masked_scatter(o, h[:, :, o]) | k = g.clone(); k[:, :, o] = h[:, :, o]; k
h[:, :, i] | h.index_select(2, i) | torch.index_select(h, -2, i) | h[:, :, [int(k) for k in i]] | h.gather(2, i[None, None, :, None].expand(2, 8, 4, 6)) | h.take_along_dim(i[None, None, :, None], 2)
h.flip(3) | torch.fliplr(h.transpose(1, 3)).transpose(1, 3) | h[..., [5, 4, 3, 2, 1, 0]] | torch.flip(h, dims=(-1,))
h.roll(1, 3) | torch.cat((h[..., -1:], h[..., :-1]), 3) | torch.roll(h, shifts=1, dims=-1)
h[:, :, ::2, ::2] | [subsampled](h)  # only block
F.pixel_shuffle(h, 2) | [pixelshuffle](h) | h.reshape(2, 2, 2, 2, 6, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 12, 12)
F.interpolate(h, scale_factor=2) | [upsample](h) | h.repeat_interleave(2, 2).repeat_interleave(2, 3) | F.upsample_nearest(h, scale_factor=2) | h[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(2, 8, 12, 12)  # not relative
F.interpolate(h, (5, 5), mode='bilinear', align_corners=False) | F.grid_sample(h, F.affine_grid(torch.eye(2, 3).double().expand(2, 2, 3), (2, 8, 5, 5), align_corners=False), align_corners=False, padding_mode='border') | [bilinear](h)
h.cumsum(3) | torch.cumsum(h, -1) | h.clone().cumsum_(3)
(h * g.mean(1, keepdim=True).flatten(2).softmax(2).reshape(2, 1, 6, 6)).sum((2, 3)) | torch.bmm(h.flatten(2), g.mean(1).flatten(1).softmax(1)[:, :, None]).squeeze(2) | (h.flatten(2) @ g.mean(1).flatten(1).softmax(1)[:, :, None]).squeeze(2) | torch.einsum('bcn,bn->bc', h.flatten(2), g.mean(1).flatten(1).softmax(1))
F.layer_norm(h, (6, 6), None, None) | [layernorm](h) | torch.layer_norm(h, (6, 6)) | F.layer_norm(input=h, normalized_shape=[6, 6])
F.unfold(h, 2, stride=2) | [unfold](h) | h.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).reshape(2, 32, 9)
F.conv2d(h, K) | (K.flatten(1) @ F.unfold(h, 3)).unflatten(2, (4, 4)) | torch.einsum('kc,bcn->bkn', K.flatten(1), F.unfold(h, 3)).unflatten(2, (4, 4))
ops.deform_conv2d(h, torch.zeros(2, 18, 6, 6).double(), K, padding=1) | F.conv2d(h, K, padding=1)
F.dropout(h, training=False) | h | [dropout](h) | [identity](h) | +h | torch.as_tensor(h) | h.nan_to_num() | h.contiguous() | h * 1. | h + 0 | h / 1 | h.to(C)
'''


def parse(text):
    '''Rows of a table: names with their forms, and notes after a number sign.'''
    for line in filter(None, map(str.strip, text.splitlines())):
        name, forms = re.fullmatch(r'(?:(~?[a-z0-9_ ]+): )?(.*)', line).groups()
        forms, *notes = (part.strip() for part in forms.split('  # '))
        yield name or '', [form.strip() for form in forms.split(' | ')], notes
