{{- define "rmd.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{- define "rmd.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- /* Of every object. Prometheus takes its `job` from the first: the alerts select job="rmd". */ -}}
{{- define "rmd.labels" -}}
app.kubernetes.io/name: rmd
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Of one server's pods: {root, server}. */ -}}
{{- define "rmd.selector" -}}
app.kubernetes.io/name: rmd
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .server.name }}
{{- end }}

{{- /* Every kind of machine with its defaults, as JSON by name. */ -}}
{{- define "rmd.hardware" -}}
{{- $all := dict }}
{{- range .Values.hardware }}
{{- $engines := merge (dict) (default dict .engines) (dict "build" false "job" true "size" "20Gi" "storageClassName" "" "accessModes" (list "ReadWriteMany") "claim" "") }}
{{- $one := merge (dict "engines" $engines) . (dict "gpuProduct" "" "gpuResource" "nvidia.com/gpu" "runtimeClassName" "" "nodeSelector" dict "tolerations" list) }}
{{- if $one.gpuProduct }}
{{- $_ := set $one "nodeSelector" (merge (dict "nvidia.com/gpu.product" $one.gpuProduct) $one.nodeSelector) }}
{{- end }}
{{- if hasKey $all .name }}{{ fail (printf "hardware: two are called '%s'" .name) }}{{ end }}
{{- $_ := set $all .name $one }}
{{- end }}
{{- toJson $all }}
{{- end }}

{{- /* Every server: `server` under its own entry, its machine in place of the machine's name. As a JSON list. */ -}}
{{- define "rmd.servers" -}}
{{- $hardware := include "rmd.hardware" . | fromJson }}
{{- $names := list }}
{{- $hosts := dict }}
{{- $all := list }}
{{- range .Values.servers }}
{{- if has .name $names }}{{ fail (printf "servers: two are called '%s'" .name) }}{{ end }}
{{- $names = append $names .name }}
{{- $one := mergeOverwrite (deepCopy $.Values.server) . }}
{{- if not (hasKey $hardware $one.hardware) }}
{{- fail (printf "server '%s': there is no hardware '%s'; there are %s" .name $one.hardware (keys $hardware | sortAlpha | join ", ")) }}
{{- end }}
{{- $_ := set $one "hardware" (get $hardware $one.hardware) }}
{{- /* The defaults' roll-out parameters are not Recreate's; an entry's own would be a contradiction. */}}
{{- if eq $one.strategy.type "Recreate" }}
{{- if (default dict .strategy).rollingUpdate }}
{{- fail (printf "server '%s': strategy.type Recreate has no rollingUpdate; leave it out" .name) }}
{{- end }}
{{- $_ := set $one "strategy" (dict "type" "Recreate") }}
{{- end }}
{{- include "rmd.check" (dict "root" $ "server" $one) }}
{{- with $one.host }}
{{- if hasKey $hosts . }}{{ fail (printf "servers '%s' and '%s' have one host, %s; each needs its own" (get $hosts .) $one.name .) }}{{ end }}
{{- $_ := set $hosts . $one.name }}
{{- end }}
{{- $all = append $all $one }}
{{- end }}
{{- toJson $all }}
{{- end }}

{{- /* A setting as its RMD_* variable has it: lists by commas, numbers without exponents. */ -}}
{{- define "rmd.setting" -}}
{{- if kindIs "slice" . }}{{ $parts := list }}{{ range . }}{{ $parts = append $parts (include "rmd.setting" .) }}{{ end }}{{ join "," $parts -}}
{{- else if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{- define "rmd.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "rmd.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* What all pods have in common: {root, hardware}. One that asksKubernetes has the account that KubeRay makes for it. */ -}}
{{- define "rmd.pod" -}}
# Else a Service called rmd would set RMD_PORT in every pod.
enableServiceLinks: false
{{- if not .asksKubernetes }}
serviceAccountName: {{ .root.Values.serviceAccountName }}
automountServiceAccountToken: false
{{- end }}
securityContext: {{- include "rmd.podSecurity" . | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .hardware.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .hardware.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .hardware.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Folders that may be written on a read-only root, and the models: {root, server}. Compiled kernels are unpacked to /tmp. */ -}}
{{- define "rmd.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .server.tmpSize }}}
- name: home
  emptyDir: {sizeLimit: 1Gi}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .server.shmSize }}}
{{- with .root.Values.models }}
- name: models
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "rmd.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/rmd}
- {name: shm, mountPath: /dev/shm}
{{- if .root.Values.models }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- /* The resources of one container: {server}, whose GPUs are a limit. */ -}}
{{- define "rmd.resources" -}}
{{- $resources := deepCopy .server.resources }}
{{- if gt (int .server.gpus) 0 }}
{{- $_ := set $resources "limits" (mergeOverwrite (default dict $resources.limits) (dict .server.hardware.gpuResource .server.gpus)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- /* The claim of the engines that are built ahead for one kind of machine: {root, hardware}. */ -}}
{{- define "rmd.enginesClaim" -}}
{{- .hardware.engines.claim | default (printf "%s-engines-%s" (include "rmd.name" .root) .hardware.name) }}
{{- end }}

{{- /* Where a server's engines lie: {root, hardware}. */ -}}
{{- define "rmd.enginesVolume" -}}
{{- if .hardware.engines.build -}}
persistentVolumeClaim: {claimName: {{ include "rmd.enginesClaim" . }}}
{{- else -}}
emptyDir: {sizeLimit: {{ .hardware.engines.size }}}
{{- end }}
{{- end }}

{{- /* Longer than preStop, drain_seconds, the batch that runs (5), the films' jobs (30) and the last replies (10): {root, server}. */ -}}
{{- define "rmd.graceSeconds" -}}
{{- add .root.Values.preStopSeconds (ceil (default 60 .server.settings.drain_seconds) | int) 60 }}
{{- end }}

{{- /* The commands that build some servers' engines, a JSON list. */ -}}
{{- define "rmd.builds" -}}
{{- $builds := list }}
{{- range $server := . }}
{{- range .checkpoints }}
{{- $args := list "build" "--checkpoint" . "--engines" "/engines" "--device" (ternary "cuda" "cpu" (gt (int $server.gpus) 0)) }}
{{- range $name := list "backend" "buckets" "dtype" "threads" "decoder" }}
{{- if hasKey $server.settings $name }}
{{- $args = concat $args (list (printf "--%s" $name) (include "rmd.setting" (get $server.settings $name))) }}
{{- end }}
{{- end }}
{{- if not (has $args $builds) }}{{ $builds = append $builds $args }}{{ end }}
{{- end }}
{{- end }}
{{- toJson $builds }}
{{- end }}

{{- /* A container that builds the engines of one checkpoint, what is built already left out: {root, server, args, name}. */ -}}
{{- define "rmd.builder" -}}
name: {{ .name }}
image: {{ include "rmd.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args: {{- toYaml .args | nindent 2 }}
resources: {{- include "rmd.resources" . | nindent 2 }}
securityContext: {{- include "rmd.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: engines, mountPath: /engines}
  {{- include "rmd.mounts" . | nindent 2 }}
{{- end }}
