// Calls the gateway's gRPC API from Node and prints every message as a line of JSON.
//
//   node client.js ADDRESS protos|reflection models
//   node client.js ADDRESS protos|reflection at-once|generate|chat TEXT
//
// "protos" reads the .proto files of this repository, "reflection" asks the server and needs no file at all.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import { GrpcReflection } from "grpc-js-reflection-client";

const SERVICE = "wint2.gateway.v1.GatewayService";
const PROTOS = fileURLToPath(new URL("../../../protos", import.meta.url));
const JSON_LIKE = { keepCase: true, enums: String, longs: Number, oneofs: true };
const SAMPLING = { temperature: 0, max_tokens: 12, ignore_eos: true };

function fromProtos() {
  const file = "wint2/gateway/v1/gateway.proto";
  return grpc.loadPackageDefinition(protoLoader.loadSync(file, { ...JSON_LIKE, includeDirs: [PROTOS] }));
}

async function fromReflection(address) {
  const server = new GrpcReflection(address, grpc.credentials.createInsecure());
  return (await server.getDescriptorBySymbol(SERVICE)).getPackageObject(JSON_LIKE);
}

async function* unary(gateway, method, request) {
  yield await new Promise((resolve, reject) => {
    gateway[method](request, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

const METHODS = {
  models: (gateway) => unary(gateway, "ListModels", {}),
  "at-once": (gateway, text) => unary(gateway, "Generate", { text, sampling_params: SAMPLING }),
  generate: (gateway, text) => gateway.GenerateStream({ text, sampling_params: SAMPLING }),
  chat: (gateway, text) =>
    gateway.ChatStream({ messages: [{ role: "user", content: text }], sampling_params: SAMPLING }),
};

async function main(address, source, method, text) {
  const packages = source === "reflection" ? await fromReflection(address) : fromProtos();
  const gateway = new packages.wint2.gateway.v1.GatewayService(address, grpc.credentials.createInsecure());
  try {
    for await (const message of METHODS[method](gateway, text)) {
      console.log(JSON.stringify(message));
    }
  } catch (error) {
    console.log(JSON.stringify({ error: { status: grpc.status[error.code], message: error.details } }));
    process.exitCode = 1;
  } finally {
    gateway.close();
  }
}

await main(...process.argv.slice(2));
