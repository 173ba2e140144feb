// Checks Kubernetes objects against the JSON schemas of their kinds:
//   node manifests.mjs FILE.yaml...
// Schemas are those of Kubernetes and KEDA, compiled into npm packages.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { join } from "node:path";

const require = createRequire(join(process.cwd(), "package.json"));
const { parseAllDocuments } = require("yaml");

const schemas = {
  "v1 ConfigMap": "kubernetes-models/_schemas/IoK8sApiCoreV1ConfigMap.js",
  "v1 Secret": "kubernetes-models/_schemas/IoK8sApiCoreV1Secret.js",
  "v1 Service": "kubernetes-models/_schemas/IoK8sApiCoreV1Service.js",
  "apps/v1 Deployment": "kubernetes-models/_schemas/IoK8sApiAppsV1Deployment.js",
  "policy/v1 PodDisruptionBudget": "kubernetes-models/_schemas/IoK8sApiPolicyV1PodDisruptionBudget.js",
  "autoscaling/v2 HorizontalPodAutoscaler": "kubernetes-models/_schemas/IoK8sApiAutoscalingV2HorizontalPodAutoscaler.js",
  "keda.sh/v1alpha1 ScaledObject": "@kubernetes-models/keda/_schemas/ComGithubKedacoreKedaV2ApisKedaV1alpha1ScaledObject.js",
  "keda.sh/v1alpha1 TriggerAuthentication": "@kubernetes-models/keda/_schemas/ComGithubKedacoreKedaV2ApisKedaV1alpha1TriggerAuthentication.js",
};

let checked = 0;
let wrong = 0;
for (const file of process.argv.slice(2)) {
  for (const document of parseAllDocuments(readFileSync(file, "utf8"))) {
    const object = document.toJS();
    const kind = `${object.apiVersion} ${object.kind}`;
    const problems = document.errors.map(String);
    if (!schemas[kind]) {
      problems.push("no schema for this kind");
    } else {
      const { validate } = await import(pathToFileURL(join(process.cwd(), "node_modules", schemas[kind])));
      if (!validate(object)) problems.push(...validate.errors.map((e) => `${e.instancePath} ${e.message ?? e.keyword} ${JSON.stringify(e.params)}`));
    }
    checked++;
    for (const problem of problems) {
      wrong++;
      console.error(`${file}: ${kind} ${object.metadata?.name}: ${problem}`);
    }
  }
}
console.log(`${checked} objects checked, ${wrong} errors`);
process.exit(wrong || !checked ? 1 : 0);
