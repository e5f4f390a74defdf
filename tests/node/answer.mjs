// node answer.mjs onnxruntime-node|onnxruntime-web model.onnx inputs.json
// Prints the graph's outputs, {name: {dims, data}}.
// inputs.json contains {name: {type, dims, data: base64 of little-endian bytes}}.
import { readFileSync } from 'node:fs'

const [runtime, model, inputs] = process.argv.slice(2)
const { InferenceSession, Tensor, env } = await import(runtime)
env.wasm.numThreads = 1 // of onnxruntime-web: more would need worker threads, which keep Node alive

const arrays = { uint8: Uint8Array, int64: BigInt64Array }
const feeds = {}
for (const [name, { type, dims, data }] of Object.entries(JSON.parse(readFileSync(inputs)))) {
  feeds[name] = new Tensor(type, new arrays[type](Uint8Array.from(Buffer.from(data, 'base64')).buffer), dims)
}
const session = await InferenceSession.create(readFileSync(model))
const outputs = {}
for (const [name, { dims, data }] of Object.entries(await session.run(feeds))) {
  outputs[name] = { dims, data: Array.from(data, Number) }
}
console.log(JSON.stringify(outputs))
